//go:build race

package meshtest

// Race says that the race detector is on. A test that computes in one goroutine
// costs up to thirty times as much under it and shows no race: it does a part
// of its work then, and make test runs its package once more without Race.
const Race = true
