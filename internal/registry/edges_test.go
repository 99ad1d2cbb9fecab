package registry_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// TestTheMapIsKept counts calls over two days: in minutes at first, then in
// hours, over a restart, and nothing after 30 days.
func TestTheMapIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := start(t)
		call := func(n uint64) {
			now := time.Now()
			in.AddEdges(agent("a"), []mesh.Edge{{Src: "web", Dst: "payment", Proto: "http", Allowed: n, First: now, Last: now.Add(time.Hour), Took: mesh.Histogram{0, uint32(n)}}})
		}
		calls := func(from, to time.Duration) (n uint64, windows int) {
			t.Helper()
			now := time.Now()
			list := in.windows(now.Add(-from), now.Add(-to))
			for _, e := range mesh.SumEdges(list) {
				if n += e.Allowed; e.Took.Total() != e.Allowed || e.Last.After(now) {
					t.Errorf("edge %+v does not add up", e)
				}
			}
			return n, len(list)
		}
		time.Sleep(time.Until(time.Now().Truncate(time.Hour).Add(time.Hour + 30*time.Minute)))
		call(1)
		time.Sleep(90 * time.Second)
		call(2)
		if n, windows := calls(time.Hour, 0); n != 3 || windows != 2 {
			t.Errorf("%d calls in %d windows, want 3 in two minutes", n, windows)
		}
		if n, _ := calls(20*time.Second, 0); n != 2 {
			t.Errorf("%d calls in this minute, want 2", n)
		}
		in.restart()
		call(4)
		if n, _ := calls(time.Hour, 0); n != 7 {
			t.Errorf("%d calls after a restart, want 7", n)
		}
		time.Sleep(5 * time.Hour)
		call(8)
		if n, _ := calls(time.Hour, 0); n != 8 {
			t.Errorf("%d calls in the last hour, want 8", n)
		}
		if n, windows := calls(24*time.Hour, 0); n != 15 || windows != 3 {
			t.Errorf("%d calls in %d windows, want 15 in two hours, one of them of two processes", n, windows)
		}
		if n, _ := calls(24*time.Hour, 2*time.Hour); n != 7 {
			t.Errorf("%d calls before, want 7", n)
		}
		time.Sleep(31 * 24 * time.Hour)
		if n, _ := calls(40*24*time.Hour, 0); n != 0 {
			t.Errorf("%d calls are kept for longer than 30 days", n)
		}
	})
}

// TestAWindowThatCannotBeReadIsPassedOver spoils the window of the hour, and
// reads that of the minute.
func TestAWindowThatCannotBeReadIsPassedOver(t *testing.T) {
	in := start(t)
	in.AddEdges(agent("a"), []mesh.Edge{{Src: "a", Dst: "b", Allowed: 1}})
	in.edgesNow()
	list, err := in.store.List(t.Context(), store.KindEdges, "", 0)
	if err != nil || len(list) != 2 {
		t.Fatalf("%d windows in the store, %v, want a minute and an hour", len(list), err)
	}
	spoiled := strings.Replace(list[1].Key, "@", "@0", 1)
	if _, err := in.store.Write(t.Context(), store.Op{Kind: store.KindEdges, Key: spoiled, Value: []byte("no")}); err != nil {
		t.Fatal(err)
	}
	if got := in.edgesNow(); len(got) != 1 || got[0].Allowed != 1 {
		t.Errorf("edges beside a window that cannot be read: %+v, want one call", got)
	}
}

// TestOneAgentLeavesRoomInTheMap has an agent tell as many edges between ends as
// long as it may, and another one tell a call.
func TestOneAgentLeavesRoomInTheMap(t *testing.T) {
	in := start(t)
	long := strings.Repeat("x", 500)
	var many []mesh.Edge
	for i := range 10_000 {
		many = append(many, mesh.Edge{Src: long, Dst: fmt.Sprint("spiffe://", i, long), Proto: "http", Allowed: 1})
	}
	for range 3 {
		in.AddEdges(agent("bad"), many)
	}
	in.AddEdges(agent("good"), []mesh.Edge{{Src: "a", Dst: "b", Proto: "http", Allowed: 1}})
	got := in.edgesNow()
	own, total := false, uint64(0)
	for _, e := range got {
		own = own || e.Src == "a" && e.Dst == "b"
		total += e.Allowed
	}
	if !own || total != 30_001 || len(got) > 4096+2 {
		t.Errorf("%d edges of %d calls, that of the other agent is there: %v", len(got), total, own)
	}
}
