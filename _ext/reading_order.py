"""The order in which pages are read. Sections: conf.py; a page not listed comes last.

The first page that a page names under "Next" is the one that follows here.
"""

ORDER = [
    "plot_ensembling.py",
    "plot_recipes.py",
    "plot_what_vmap_refuses.py",
    "plot_from_functorch.py",
    "plot_training.py",
    "plot_state.py",
    "plot_saving.py",
    "plot_hyperparameter_sweep.py",
    "plot_population.py",
    "plot_faster_training.py",
    "plot_when_vmap_pays.py",
    "plot_what_vmap_runs.py",
    "plot_fastest_ensemble.py",
    "plot_how_equal.py",
    "plot_memory.py",
    "plot_regression.py",
    "plot_more_members.py",
    "plot_unknown_inputs.py",
    "plot_from_many_to_few.py",
    "plot_many_devices.py",
    "plot_checkpoints.py",
    "plot_how_far.py",
    "plot_per_sample_gradients.py",
    "plot_jacobians_and_hessians.py",
]


def key(name):
    """Sort key of a tutorial's file name, for Sphinx-Gallery."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)
