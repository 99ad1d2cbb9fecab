package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

var caller = spiffeid.RequireFromString("spiffe://mesh.test/caller")

func addrOf(n int) netip.AddrPort { return netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:443", n)) }

func begin(t *testing.T, o *Outside, cfg mesh.Routes) *Try {
	t.Helper()
	try, err := o.Begin(caller, "host:a.test", "host:*.test", cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	return try
}

func rank(t *Try, i int) int { return t.Ranks([]netip.AddrPort{addrOf(i)})[0] }

// What DNS answers with pushes nothing out that was learned by calls.
func TestToRankRemembersNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // a rest ends with time
		var o Outside
		try := begin(t, &o, mesh.Routes{})
		try.Unmade(addrOf(0))
		for i := 1; i < 3*maxAddresses; i++ {
			if r := rank(try, i); r != Well {
				t.Fatalf("an address that nobody called has rank %d", r)
			}
		}
		if n := len(try.host.at); n != 1 || rank(try, 0) != Rests {
			t.Errorf("%d addresses are remembered, the one that was called with rank %d", n, rank(try, 0))
		}
	})
}

func TestAddressesOutsideRestAndAreForgiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o Outside
		try := begin(t, &o, mesh.Routes{})
		try.Unmade(addrOf(1))
		if a, b := rank(try, 1), rank(try, 2); a != Rests || b != Well {
			t.Errorf("ranks %d and %d", a, b)
		}
		time.Sleep(firstRest)
		if r := rank(try, 1); r != Well {
			t.Errorf("after its rest: %d", r)
		}
		try.Unmade(addrOf(1))
		time.Sleep(firstRest)
		if r := rank(try, 1); r != Rests {
			t.Errorf("the second rest is not longer: %d", r)
		}
		try.On(addrOf(1))
		if r := rank(try, 1); r != Well {
			t.Errorf("once it is connected to: %d", r)
		}
		try.Tell(OK, time.Now(), 0)
		try.End()
	})
}

func TestAddressesOutsideArePutAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []Trouble
		o := Outside{Changed: func(x Trouble) { told = append(told, x) }}
		cfg := mesh.Routes{Outlier: &mesh.Outlier{Consecutive: 2, Ejection: time.Minute}}
		for range 2 {
			try := begin(t, &o, cfg)
			try.Ranks([]netip.AddrPort{addrOf(1), addrOf(2)})
			try.On(addrOf(1))
			try.Tell(Failed, time.Now(), 0)
			try.End()
		}
		try := begin(t, &o, cfg)
		if a, b := rank(try, 1), rank(try, 2); a != Aside || b != Well {
			t.Errorf("ranks %d and %d", a, b)
		}
		if len(told) != 1 || told[0].Kind != Ejected || told[0].Address != addrOf(1) || len(o.Troubles()) != 1 {
			t.Errorf("told %+v, lists %+v", told, o.Troubles())
		}
		time.Sleep(time.Minute)
		if r := rank(try, 1); r != Well {
			t.Errorf("after its time: %d", r)
		}
		try.End()
	})
}

func TestHostsOutsideAreCutOffAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []Trouble
		o := Outside{Changed: func(x Trouble) { told = append(told, x) }}
		cfg := mesh.Routes{Breaker: &mesh.Breaker{Consecutive: 1, Open: time.Hour, MaxOpen: time.Hour}}
		try := begin(t, &o, cfg)
		try.Tell(Failed, time.Now(), 0) // it came to no connection
		try.End()
		if _, err := o.Begin(caller, "host:a.test", "host:*.test", cfg, false); !errors.Is(err, ErrOpen) {
			t.Errorf("the next call: %v", err)
		}
		if _, err := o.Begin(caller, "host:b.test", "host:*.test", cfg, false); err != nil {
			t.Errorf("another host of the pattern: %v", err)
		}
		time.Sleep(forgetOutside + time.Second)
		o.Sweep()
		if len(told) != 2 || told[0].Kind != Open || told[1].Kind != Closed || told[1].Dst != "host:*.test" || o.all != 0 {
			t.Errorf("told %+v, %d hosts are known", told, o.all)
		}
	})
}

// TestNobodyCutsOffAnother has one caller's calls fail.
func TestNobodyCutsOffAnother(t *testing.T) {
	var o Outside
	cfg := mesh.Routes{Breaker: &mesh.Breaker{Consecutive: 1, Open: time.Hour}}
	other := spiffeid.RequireFromString("spiffe://mesh.test/other")
	for _, who := range []spiffeid.ID{caller, other} {
		try, err := o.Begin(who, "host:a.test", "host:a.test", cfg, false)
		if err != nil {
			t.Fatal(err)
		}
		try.Tell(Failed, time.Now(), 0)
		try.End()
		if _, err := o.Begin(who, "host:a.test", "host:a.test", cfg, false); !errors.Is(err, ErrOpen) {
			t.Errorf("%s is not cut off: %v", who, err)
		}
	}
	if list := o.Troubles(); len(list) != 1 {
		t.Errorf("one host stands in the list as %+v", list)
	}
}

// TestWhatIsForgottenTellsNothing has a call fail after its host was forgotten.
func TestWhatIsForgottenTellsNothing(t *testing.T) {
	var told []Trouble
	o := Outside{Changed: func(x Trouble) { told = append(told, x) }}
	cfg := mesh.Routes{Breaker: &mesh.Breaker{Consecutive: 1}}
	old := begin(t, &o, cfg)
	begin(t, &o, mesh.Routes{}).End() // the policy has changed
	old.Tell(Failed, time.Now(), 0)
	old.End()
	if len(told) != 0 {
		t.Errorf("told %+v", told)
	}
}

func TestRetriesOutsideHaveABudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o Outside
		cfg := mesh.Routes{Budget: mesh.Budget{Share: 1, Floor: 1}}
		try := begin(t, &o, cfg)
		n := 0
		for try.Retry() {
			n++
		}
		if n != 10 {
			t.Errorf("%d retries in ten seconds, of one a second", n)
		}
		try.End()
	})
}

func TestWhatIsKnownOutsideIsBounded(t *testing.T) {
	var o Outside
	try := begin(t, &o, mesh.Routes{})
	for i := range 3 * maxAddresses {
		try.Unmade(addrOf(i))
	}
	if n, whole := len(try.host.at), len(try.host.whole); n != maxAddresses || whole != n {
		t.Errorf("%d addresses, %d in all", n, whole)
	}
	many := func(who spiffeid.ID, n int) {
		for i := range n {
			if _, err := o.Begin(who, fmt.Sprintf("host:%d.test", i), "", mesh.Routes{}, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	many(caller, maxOfOne+10)
	if last := o.by[caller][fmt.Sprintf("host:%d.test", maxOfOne+9)]; o.all != maxOfOne || last == nil {
		t.Errorf("%d hosts of one caller, of which the last is %v", o.all, last)
	}
	for i := range maxOutside / maxOfOne {
		many(spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.test/%d", i)), maxOfOne)
	}
	few := spiffeid.RequireFromString("spiffe://mesh.test/few")
	many(few, 10)
	if o.all != maxOutside || len(o.by[few]) != 10 {
		t.Errorf("%d hosts, %d of who has few", o.all, len(o.by[few]))
	}
	var none *Try
	none.Unmade(addrOf(1))
	none.On(addrOf(1))
	none.Tell(OK, time.Now(), 0)
	none.End()
	if none.Retry() || rank(none, 1) != Well {
		t.Error("something is known of nothing")
	}
}
