//! vmtest.
