"""What people type when they look for a page, beside the words that stand on it.

Search finds a page first whose phrase holds what was typed (at least half of the
phrase). Add a phrase in the words of somebody who has the problem.
"""

from docutils import nodes
from sphinx import addnodes

from _ext import gallery

PHRASES = {
    "basics/plot_ensembling": ["stack_module_state", "ensemble vmap", "ensembling"],
    "basics/plot_recipes": ["how to", "cheat sheet", "examples of vmap ensembles"],
    "basics/plot_what_vmap_refuses": [
        *["vmap error", "runtimeerror vmap", "randomness error", "vmap limitations"],
        *["vmap .item()", "data-dependent control flow", "in_dim float"],
    ],
    "basics/plot_from_functorch": [
        *["functorch deprecated", "combine_state_for_ensemble", "jax vmap pytorch"],
        *["make_functional_with_buffers", "migrate from functorch"],
    ],
    "speed/plot_what_vmap_runs": [
        *["vmap slower than for loop", "why is vmap slow", "vmap slow"],
    ],
    "speed/plot_when_vmap_pays": ["is vmap faster than a for loop", "vmap speedup"],
    "speed/plot_fastest_ensemble": ["ensemble faster inference", "vmap inference"],
    "speed/plot_memory": ["cuda out of memory", "vmap memory", "oom"],
    "speed/plot_how_equal": ["vmap different results", "allclose fails", "tf32"],
    "training/plot_hyperparameter_sweep": [
        *["different learning rate per model", "learning rate for each model"],
        *["learning rate per member", "weight decay per model"],
    ],
    "training/plot_state": ["batch norm vmap", "dropout vmap", "tied weights"],
    "training/plot_faster_training": ["compile training step", "fused adam vmap"],
    "training/plot_training": [
        *["train ensemble vmap", "adam per model", "gradient clipping per model"],
    ],
    "training/plot_saving": ["save ensemble", "load ensemble", "unstack models"],
    "uncertainty/plot_unknown_inputs": [
        *["out of distribution", "out-of-distribution detection", "ood detection"],
    ],
    "uncertainty/plot_more_members": [
        *["how many members", "calibration error (ece)", "temperature scaling"],
    ],
    "uncertainty/plot_from_many_to_few": ["ensemble selection", "distillation"],
    "uncertainty/plot_regression": ["aleatoric and epistemic uncertainty"],
    "scale/plot_many_devices": ["multi gpu ensemble", "ddp ensemble", "multiple gpus"],
    "scale/plot_checkpoints": ["distributed checkpoint", "resume killed training"],
    "scale/plot_how_far": ["thousands of models", "a million models", "how many gpus"],
    "beyond/plot_per_sample_gradients": ["per-example gradients", "dp-sgd clipping"],
    "beyond/plot_jacobians_and_hessians": ["hessian vector product", "jacobian batch"],
}


def add_phrases(app, doctree):
    for phrase in PHRASES.get(gallery.tutorial_of(app.env.docname), []):
        title = next(doctree.findall(nodes.section))
        entry = ("single", phrase, title["ids"][0], "main", None)
        title.insert(1, addnodes.index(entries=[entry]))


def setup(app):
    app.connect("doctree-read", add_phrases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
