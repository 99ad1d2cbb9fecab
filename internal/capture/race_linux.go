//go:build linux && race

package capture

// underRace has bare calls tell the race detector, as those of package syscall
// do, that what is read was written before.
const underRace = true
