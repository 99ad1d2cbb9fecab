package main

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// TestHoldPort has a program that names the port listen there, and again, as after
// a crash; two ports that are held differ.
func TestHoldPort(t *testing.T) {
	at, held, err := holdPort()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	other, also, err := holdPort()
	if err != nil {
		t.Fatal(err)
	}
	defer also.Close()
	if at == other {
		t.Fatalf("%s is given twice", at)
	}
	for range 2 {
		if c, err := net.Dial("tcp", at.String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("dial a port that is only held: %v, %v, want a refusal", c, err)
		}
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		l.Close()
	}
}
