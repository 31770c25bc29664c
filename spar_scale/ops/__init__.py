"""Operations with several backends, each behind one entry point."""
