//go:build !race

package meshtest

// Race says that the race detector is off.
const Race = false
