//go:build linux && !race

package capture

const underRace = false
