"""What goes: thresholds, what survives them, whole layers, what each group costs alone."""
