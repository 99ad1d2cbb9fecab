package registry_test

import (
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
			in.AddEdges([]mesh.Edge{{Src: "web", Dst: "payment", Proto: "http", Allowed: n, First: now, Last: now.Add(time.Hour), Took: mesh.Histogram{0, uint32(n)}}})
		}
		calls := func(from, to time.Duration) (n uint64, windows int) {
			t.Helper()
			now := time.Now()
			list, err := in.Windows(t.Context(), now.Add(-from), now.Add(-to))
			if err != nil {
				t.Fatal(err)
			}
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

func TestAWindowThatIsNoneIsSaid(t *testing.T) {
	in := start(t)
	in.AddEdges([]mesh.Edge{{Src: "a", Dst: "b", Allowed: 1}})
	in.edgesNow()
	list, err := in.store.List(t.Context(), store.KindEdges, "", 0)
	if err != nil || len(list) != 2 {
		t.Fatalf("%d windows in the store, %v, want a minute and an hour", len(list), err)
	}
	if _, err := in.store.Write(t.Context(), store.Op{Kind: store.KindEdges, Key: list[1].Key, Value: []byte("no")}); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Windows(t.Context(), time.Now().Add(-time.Hour), time.Now().Add(time.Minute)); err == nil {
		t.Error("a window that cannot be read was passed over")
	}
}
