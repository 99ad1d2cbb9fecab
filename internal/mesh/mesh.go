// Package mesh holds the nouns that every room speaks of: services, endpoints,
// rules, destinations, entries, and the snapshot that a proxy acts on.
//
// It parses and checks the reviewed policy files and compiles them. It opens no
// socket, starts no goroutine and decides nothing about a request.
package mesh

import "errors"

// ErrNotFound is returned when what was asked for does not exist.
var ErrNotFound = errors.New("not found")

// ErrChanged is returned when what was to be replaced is no longer what the
// caller read.
var ErrChanged = errors.New("changed meanwhile")
