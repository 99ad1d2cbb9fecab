package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// singleKeys has a terminal hand over each key as it is pressed, unseen, until
// restore. Ctrl-C goes on to be a signal. What is no terminal stays as it is; one
// in whose background this is has no keys for it.
func singleKeys(in *os.File) (restore func(), ours bool, err error) {
	fd := int(in.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}, true, nil //nolint:nilerr // no terminal
	}
	if front, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err != nil || front != unix.Getpgrp() {
		return func() {}, false, nil //nolint:nilerr // asking more would stop this process
	}
	one := *old
	one.Lflag &^= unix.ICANON | unix.ECHO
	one.Cc[unix.VMIN], one.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &one); err != nil {
		return nil, false, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }, true, nil
}
