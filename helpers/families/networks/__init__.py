"""Networks, pipelines and their inputs: the code that several families share."""
