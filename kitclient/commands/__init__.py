"""The commands of kitclient: each takes arguments apart, calls the library, and says what came of it."""
