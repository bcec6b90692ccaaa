"""What has to be known of a moment of a call, one file a question: each answer is observed, or it is unknown.

watching.py: what methods of other people's objects are called with. steps.py: which step of which schedule.
references.py: what the prompts became. conditions.py: which rows are under which condition, and become which image.
texts.py: the same for text encoders. guiders.py: what a modular pipeline's guider says. computed.py: whether a module
computed, or a cache answered for it.
"""
