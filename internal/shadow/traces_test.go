package shadow

import (
	"encoding/binary"
	"testing"
)

func TestTracesForgetTheOldest(t *testing.T) {
	var ts Traces
	id := func(n int) (id [16]byte) {
		binary.BigEndian.PutUint64(id[:], uint64(n))
		return id
	}
	for n := range 2 * maxTraces {
		ts.Add(id(n))
		ts.Add(id(n)) // is one
		if !ts.Has(id(n)) || len(ts.of) > maxTraces {
			t.Fatalf("%d is not known, or %d are", n, len(ts.of))
		}
	}
	for _, tt := range []struct {
		n    int
		want bool
	}{{0, false}, {maxTraces - 1, false}, {maxTraces, true}, {2*maxTraces - 1, true}} {
		if got := ts.Has(id(tt.n)); got != tt.want {
			t.Errorf("trace %d: %t", tt.n, got)
		}
	}
	if none := (*Traces)(nil); none.Has(id(1)) {
		t.Error("nobody knows a trace")
	}
}
