package record

import (
	"strings"
	"testing"
)

// TestRest has ends give up their keys between records, by themselves and both,
// before and after the keys have changed.
func TestRest(t *testing.T) {
	for _, id := range suites {
		client, server := pair(t)
		ofSuite(t, id, client, server)
		talk := func() {
			t.Helper()
			for _, way := range [][2]*Conn{{client, server}, {server, client}} {
				say(t, way[0], "hello")
				hear(t, way[1], "hello")
			}
		}
		for _, resting := range [][]*Conn{{client}, {server}, {client, server}} {
			for _, c := range resting {
				c.Rest()
				if c.in.aead != nil || c.out.aead != nil {
					t.Fatal("keys are held at rest")
				}
			}
			talk()
			for _, c := range resting {
				c.Rest()
				c.ask.Store(true) // both change their keys
			}
			talk()
			talk()
		}
		if client.in.seq == 0 || client.out.seq != server.in.seq {
			t.Errorf("%d records were written, %d read", client.out.seq, server.in.seq)
		}
		server.Rest()
		client.Rest()
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if _, err := client.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "EOF") {
			t.Errorf("a farewell from rest was read as %v", err)
		}
		server.Rest()
		if _, err := server.Write([]byte("x")); err == nil || server.out.aead != nil {
			t.Errorf("written after the end: %v", err)
		}
	}
}

// TestRestAgainstCryptoTLS keeps to the keys that the peer has.
func TestRestAgainstCryptoTLS(t *testing.T) {
	ours, theirs := withTLS(t, true)
	for range 3 {
		ours.Rest()
		say(t, theirs, "hello")
		hear(t, ours, "hello")
		ours.Rest()
		say(t, ours, "good day")
		hear(t, theirs, "good day")
	}
}
