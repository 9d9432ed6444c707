//! Files of a closed store, changed: it serves what was acknowledged, or says that it cannot.
