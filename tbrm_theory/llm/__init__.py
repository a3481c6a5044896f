"""Language models: the trainer, the exact oracle, tasks; the optional extra ``llm``."""
