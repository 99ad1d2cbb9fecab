//go:build !linux

package daemon

// Conceal is for Linux.
func Conceal() {}
