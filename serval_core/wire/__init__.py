"""Wire formats: one file per format, each with `parse` and `emit`, where `parse(emit(x)) == x`."""
