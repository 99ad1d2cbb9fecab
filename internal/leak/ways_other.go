//go:build !linux

package leak

// ways are those of Linux, whose kernel is the one that can close them.
func ways() []way { return nil }
