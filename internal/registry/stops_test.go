package registry_test

import (
	"errors"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

func TestStopsOfFaultsLast(t *testing.T) {
	in := start(t)
	before := time.Now().Add(time.Hour).UTC()
	first, err := in.StopFaults(t.Context(), mesh.FaultStop{Fault: "a/b/c", Before: before, By: "alice"})
	if err != nil || first == 0 {
		t.Fatalf("revision %d, %v", first, err)
	}
	// An earlier end does not take back what holds for longer.
	again, err := in.StopFaults(t.Context(), mesh.FaultStop{Fault: "a/b/c", Before: before.Add(-time.Minute)})
	if err != nil || again != first {
		t.Errorf("revision %d, %v; want %d", again, err, first)
	}
	in.restart()
	got := in.FaultStops()
	if s := got.Of("a/b/c", before.Add(-time.Second)); s == nil || s.By != "alice" || got.Revision < first {
		t.Errorf("after a restart %+v", got)
	}
}

func sharedStops(f *fleet) {
	a, b := f.join("a", true), f.join("b", true)
	changed := a.Changed()
	rev, err := b.StopFaults(f.t.Context(), mesh.FaultStop{Fault: mesh.AllFaults, Before: f.now().Add(time.Hour)})
	if err != nil {
		f.t.Fatal(err)
	}
	f.eventually("a knows what b stopped", func() bool { return a.FaultStops().Revision == rev && a.FaultStops().Of("x/y/z", f.now()) != nil })
	select {
	case <-changed: // a moment after it is known
	case <-time.After(time.Minute):
		f.t.Error("nobody who waits is woken")
	}
	f.eventually("both count two issuers", func() bool { return a.Issuers() == 2 && b.Issuers() == 2 })
}

func TestAStopThatIsNotRecordedIsNotMade(t *testing.T) {
	in := start(t)
	full := errors.New("disk full")
	in.onStop = func(mesh.FaultStop) error { return full }
	in.restart()
	if _, err := in.StopFaults(t.Context(), mesh.FaultStop{Fault: mesh.AllFaults, Before: time.Now()}); !errors.Is(err, full) || len(in.FaultStops().All) > 0 {
		t.Errorf("%v, %+v", err, in.FaultStops())
	}
}
