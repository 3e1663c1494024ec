"""Prefixes that other libraries wrote: one module for each format, and the detection of which it is.

Every format gives the same: a :class:`~prefixkit.prefix_config.PrefixConfig`, and the tensors that a checkpoint of
prefixkit would hold. The rest of loading does not know where they come from.
"""
