package shadow

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"
)

// TestTracesEnd has a trace believed while a call of it is here and a moment
// longer, and one peer take no room from others.
func TestTracesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ts Traces
		id := func(n int) (id [16]byte) {
			binary.BigEndian.PutUint64(id[:], uint64(n))
			return id
		}
		time.Sleep(time.Minute)
		for n := range maxPerPeer {
			if !ts.Begin("a", id(n)) {
				t.Fatalf("trace %d is not remembered", n)
			}
		}
		if ts.Begin("a", id(maxPerPeer)) || !ts.Begin("a", id(0)) || !ts.Begin("b", id(maxPerPeer+1)) {
			t.Error("one peer's traces are not bounded, or bound another's")
		}
		ts.End(id(0))
		time.Sleep(grace)
		if !ts.Has(id(0)) {
			t.Error("a trace with a call is over")
		}
		ts.End(id(0))
		time.Sleep(grace - time.Nanosecond)
		if !ts.Has(id(0)) {
			t.Error("no moment is left")
		}
		time.Sleep(time.Nanosecond)
		if ts.Has(id(0)) || !ts.Has(id(1)) {
			t.Error("a trace is believed for ever, or one that is here is not")
		}
		if !ts.Begin("a", id(maxPerPeer)) || ts.Begin("a", id(0)) || ts.peers["a"] != maxPerPeer {
			t.Errorf("no room was made: %d", ts.peers["a"])
		}
		if none := (*Traces)(nil); none.Has(id(1)) || none.Begin("a", id(1)) {
			t.Error("nobody knows a trace")
		}
	})
}
