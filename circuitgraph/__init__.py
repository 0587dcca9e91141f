"""The whole graph of computation of a transformer. Names of the public interface are imported when they are first used, so that `import circuitgraph` takes no time."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_STAGES = {
    "model": ("Model", "UnsupportedModel", "list_nodes", "load_model"),
    "data": ("Corpus", "load_corpus", "read_corpus"),
    "task": ("Task", "load_task", "text_task"),
    "dictionary": ("Dictionary", "FunctionDictionary", "Gate", "LinearDictionary", "from_saelens", "load_dictionaries", "load_dictionary", "neuron_basis", "principal_components", "run_spliced", "save_dictionary", "whole_module"),
    "train": ("Recipe", "collect_activations", "collect_gradients", "interaction_basis", "measure_dictionaries", "train_dictionaries", "train_dictionary", "train_interaction_bases"),
    "graph": ("Graph", "GraphError", "density", "select_edges"),
    "build": ("build_graph", "complete_graph"),
    "prompt": ("add_influence", "prune_by_influence", "save_attribution_graph", "score_prompt"),
    "ablate": ("Evaluation", "ablation_curve", "compare_curves", "evaluate", "minimality", "run_ablated"),
    "baseline": ("compare_methods", "learn_masks", "list_methods", "patch_edges", "patch_nodes", "prune_greedily", "random_graph", "read_off", "score_ranks", "trace_flow"),
    "feature_baseline": ("ablate_circuit_nodes", "find_feature_circuit", "list_feature_methods", "random_features", "trace_contributions", "weigh_interactions"),
    "community": ("cluster_patterns", "compare_patterns", "confirm_communities", "consensus", "count_tokens", "find_communities", "judge_communities", "judge_patterns", "leave_out", "nest_communities", "other_groupings", "profile_resolutions", "quality", "read_directions", "read_patterns", "rewire", "share_weights", "shuffle_patterns"),
    "behaviour": ("behaviour_task", "class_behaviours", "compare_groupings", "draw_controls", "gradient_behaviours", "locate_behaviours", "loss_behaviours", "loss_gradients", "match_behaviours", "summarise_matches", "task_behaviours"),
    "community_view": ("plot_behaviours", "plot_communities", "plot_community_layers", "plot_flow", "view_communities"),
    "features": ("plot_activations", "plot_quality", "read_features", "show_top", "top_activations", "view_features"),
    "view": ("plot_curve", "plot_layers", "plot_matrix", "plot_strength", "plot_weights", "use_static_renderer", "view", "view_ablation", "write_report"),
}
_HOME = {name: stage for stage, names in _STAGES.items() for name in names}
__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .ablate import Evaluation, ablation_curve, compare_curves, evaluate, minimality, run_ablated
    from .baseline import compare_methods, learn_masks, list_methods, patch_edges, patch_nodes, prune_greedily, random_graph, read_off, score_ranks, trace_flow
    from .behaviour import behaviour_task, class_behaviours, compare_groupings, draw_controls, gradient_behaviours, locate_behaviours, loss_behaviours, loss_gradients, match_behaviours, summarise_matches, task_behaviours
    from .build import build_graph, complete_graph
    from .community import cluster_patterns, compare_patterns, confirm_communities, consensus, count_tokens, find_communities, judge_communities, judge_patterns, leave_out, nest_communities, other_groupings, profile_resolutions, quality, read_directions, read_patterns, rewire, share_weights, shuffle_patterns
    from .community_view import plot_behaviours, plot_communities, plot_community_layers, plot_flow, view_communities
    from .data import Corpus, load_corpus, read_corpus
    from .dictionary import Dictionary, FunctionDictionary, Gate, LinearDictionary, from_saelens, load_dictionaries, load_dictionary, neuron_basis, principal_components, run_spliced, save_dictionary, whole_module
    from .feature_baseline import ablate_circuit_nodes, find_feature_circuit, list_feature_methods, random_features, trace_contributions, weigh_interactions
    from .features import plot_activations, plot_quality, read_features, show_top, top_activations, view_features
    from .graph import Graph, GraphError, density, select_edges
    from .model import Model, UnsupportedModel, list_nodes, load_model
    from .prompt import add_influence, prune_by_influence, save_attribution_graph, score_prompt
    from .task import Task, load_task, text_task
    from .train import Recipe, collect_activations, collect_gradients, interaction_basis, measure_dictionaries, train_dictionaries, train_dictionary, train_interaction_bases
    from .view import plot_curve, plot_layers, plot_matrix, plot_strength, plot_weights, use_static_renderer, view, view_ablation, write_report


def __getattr__(name: str) -> Any:
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Importing a submodule sets it on its package; where a function has the same name (`view`), the function is what the package shows, in whatever order they are imported."""
    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)): super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
