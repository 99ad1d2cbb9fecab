package mesh

import (
	"math"
	"testing"
	"time"
)

// Whatever each is asked for, all together get what there is and no more.
func TestPartsAddUp(t *testing.T) {
	const rate = 100
	for _, own := range [][]uint32{{0}, {0, 0, 0}, {500}, {500, 0}, {30, 20, 0}, {100, 1}, {1000, 1000, 1000, 3}, {99, 0}, {50, 50}} {
		tot := Total{Proxies: uint32(len(own)), Issuers: 1}
		for _, n := range own {
			tot.Calls += uint64(n)
		}
		sum := 0.0
		for _, n := range own {
			part := tot.Part(rate, n)
			if tot.Calls < rate && part < float64(n) || part <= 0 {
				t.Errorf("of %v, who is asked for %d gets %.1f", own, n, part)
			}
			sum += part
		}
		if math.Abs(sum-rate) > 1e-6 {
			t.Errorf("%v get %.3f of %d", own, sum, rate)
		}
	}
	if got := (Total{Calls: 10, Proxies: 1, Issuers: 4}).Part(rate, 10); got != 25 {
		t.Errorf("one of four issuers gives out %.1f", got)
	}
	if got := (Total{}).Part(rate, 7); got <= 0 || got > rate {
		t.Errorf("a total of nothing gives %.1f", got)
	}
}

func TestFaultsAsTheyStand(t *testing.T) {
	now := time.Unix(1.8e9, 0).UTC()
	fault := func(name string, since, until time.Duration) Fault {
		return Fault{Name: name, Delay: time.Second, Status: 503, Since: now.Add(since), Until: now.Add(until)}
	}
	s := &Snapshot{Routes: []Routes{{Service: "billing", Routes: []Route{{Name: "all", Faults: []Fault{
		fault("now", -time.Minute, time.Hour), fault("later", time.Minute, time.Hour), fault("over", -time.Hour, -time.Minute), fault("ended", -time.Minute, time.Hour),
	}}}}}}
	stops := &FaultStops{All: []FaultStop{{Fault: "billing/all/ended", Before: now}, {Fault: "billing/all/later", Before: now}, {Fault: "billing/all/over", Before: now}}}
	want := map[string]string{"billing/all/now": FaultActive, "billing/all/later": FaultPlanned, "billing/all/over": FaultOver, "billing/all/ended": FaultStopped}
	list := s.Faults(stops, now)
	for _, f := range list {
		if f.State != want[f.Name] || (f.Stop != nil) != (f.State == FaultStopped) || f.Does != "delay 1s, status 503" {
			t.Errorf("%+v, want %s", f, want[f.Name])
		}
	}
	if len(list) != len(want) || len((*Snapshot)(nil).Faults(stops, now)) != 0 {
		t.Errorf("%d faults", len(list))
	}
	all := &FaultStops{All: []FaultStop{{Fault: AllFaults, Before: now.Add(2 * time.Minute)}}}
	for _, f := range s.Faults(all, now) {
		if f.State != FaultStopped && f.State != FaultOver {
			t.Errorf("a stop of all leaves %+v", f)
		}
	}
	for _, bad := range []FaultStop{{}, {Fault: "a/b/c"}, {Fault: "a/b", Before: now}, {Fault: "a/b/c d", Before: now}, {Fault: "**", Before: now}} {
		if bad.Validate() == nil {
			t.Errorf("%+v passes", bad)
		}
	}
}
