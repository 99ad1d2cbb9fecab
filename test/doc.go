// Package test starts the real programs and puts them to the test from
// outside: with ordinary clients, with a go-spiffe workload, with openssl and
// curl. It has no code of its own beside the tests.
package test
