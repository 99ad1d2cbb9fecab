//go:build !linux

package socket

import "syscall"

// Tune leaves it to the system.
func Tune(string, string, syscall.RawConn) error { return nil }
