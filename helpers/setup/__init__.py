"""How a run is set up from its settings, one file a concern; train.py calls them in this order:

    model       which base model, family, method and objective
    resume      a new run, or the checkpoint it resumes from
    machine     settings that depend on this machine, and what it cannot do
    datasets    from datasets to batches
    learning    the trained weights, their optimizer and their average
    validation  prompts and images to validate on
    outputs     reports and metrics, and the export at the end

With train.py this is the only place that sees the whole Config.
"""
