"""What weight differences are used for: a stranger's is audited against a library, a library is mapped."""
