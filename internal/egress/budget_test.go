package egress

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// budgetWorld lets billing out to a host with a budget.
func budgetWorld(t *testing.T, budget string) *world {
	t.Helper()
	w := newWorld(t, nil)
	rows := access + "p, metered, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:metered.test, *, CONNECT, -, -, allow\n"
	w.use(w.policy(rows, fmt.Sprintf("  - host: metered.test\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n    budget: %s\n", w.db.addr, budget)))
	return w
}

// alone has a gateway told that it is the only one.
func (w *world) alone() { w.shared(1) }

// shared has a gateway told how many there are, and that the others use nothing.
func (w *world) shared(gateways uint32) {
	var totals []mesh.Total
	for _, d := range w.gw.Demands() {
		totals = append(totals, mesh.Total{Quota: d.Quota, Calls: uint64(d.Calls), Proxies: gateways, Issuers: 1})
	}
	w.gw.Share(totals)
}

// TestBudgetOfConnections refuses one more than a workload may have, and takes it
// again when one has ended.
func TestBudgetOfConnections(t *testing.T) {
	w := budgetWorld(t, "{conns: 2}")
	one, ref := dial1(w, billing, "metered.test:5432")
	if ref != nil {
		t.Fatalf("the first: %+v", ref)
	}
	if _, ref := dial1(w, billing, "metered.test:5432"); ref == nil || ref.status != 429 {
		t.Fatalf("the second before the gateway knows its part: %+v", ref)
	}
	w.alone()
	if _, ref := dial1(w, billing, "metered.test:5432"); ref != nil {
		t.Fatalf("the second: %+v", ref)
	}
	if _, ref := dial1(w, billing, "metered.test:5432"); ref == nil || ref.status != 429 {
		t.Fatalf("the third: %+v", ref)
	}
	w.until("the refusal", func(r audit.Record) bool { return r.Reason == string(ReasonBudget) && r.Src == billing.String() })
	one.Close()
	w.until("the end of the first", kind(audit.KindEgressClose))
	if _, ref := dial1(w, billing, "metered.test:5432"); ref != nil {
		t.Errorf("when one has ended: %+v", ref)
	}
}

// TestAPartOfAConnectionOpensOne has two gateways share one connection.
func TestAPartOfAConnectionOpensOne(t *testing.T) {
	w := budgetWorld(t, "{conns: 1}")
	for n := range 2 {
		tun, ref := dial1(w, billing, "metered.test:5432")
		if ref != nil {
			t.Fatalf("round %d: %+v", n, ref)
		}
		if _, ref := dial1(w, billing, "metered.test:5432"); ref == nil || ref.status != 429 {
			t.Errorf("round %d, the second: %+v", n, ref)
		}
		tun.Close()
		w.until("its end", kind(audit.KindEgressClose))
		w.shared(2)
	}
}

// TestBudgetOfBytes ends a tunnel that sends more than its budget has, and opens no
// other.
func TestBudgetOfBytes(t *testing.T) {
	w := budgetWorld(t, "{up: 1000000}")
	tun, ref := dial1(w, billing, "metered.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	echoes(t, tun)
	go func() { _, _ = io.Copy(io.Discard, tun) }()
	sent := 0
	for piece := make([]byte, 10_000); sent < 1_000_000; {
		n, err := tun.Write(piece)
		sent += n
		if err != nil {
			break
		}
	}
	end := w.until("its end", kind(audit.KindEgressClose))
	if end.Reason != string(ReasonBudget) || end.BytesUp < 100_000 || end.BytesUp > 500_000 {
		t.Errorf("ended for %q after %d bytes, want the first part of the budget", end.Reason, end.BytesUp)
	}
	w.until("the refusal", func(r audit.Record) bool { return r.Kind == audit.KindDecision && r.Reason == string(ReasonBudget) })
	if _, ref := dial1(w, billing, "metered.test:5432"); ref == nil || ref.status != 429 {
		t.Errorf("another one: %+v", ref)
	}
	w.alone()
	if tun, ref := dial1(w, billing, "metered.test:5432"); ref != nil {
		t.Errorf("with the whole budget: %+v", ref)
	} else {
		echoes(t, tun)
	}
}

// TestBudgetIsLevelled has two gateways use one budget, and the issuer tell each
// what both have used.
func TestBudgetIsLevelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 100 << 20
		var gws [2]Gateway
		use := func(i, n int) (used int) { // pieces of 64 KiB
			tun := &tunnel{call: authz.Call{Src: billing}, how: mesh.Destination{Host: "x.test", Budget: mesh.Allowance{Up: limit}}}
			if gws[i].tunnels.purses.open(tun, time.Now()) != nil {
				return 0
			}
			for used = 0; used < n; used++ {
				tun.up.Add(64 << 10)
				if tun.spend(true, 64<<10) != nil {
					break
				}
			}
			gws[i].tunnels.purses.shut(tun)
			return used
		}
		told := func() {
			sums := map[mesh.Quota]*mesh.Total{}
			for i := range gws {
				for _, d := range gws[i].Demands() {
					if sums[d.Quota] == nil {
						sums[d.Quota] = &mesh.Total{Quota: d.Quota, Issuers: 1}
					}
					sums[d.Quota].Calls += uint64(d.Calls)
					sums[d.Quota].Proxies++
				}
			}
			for i := range gws {
				for _, s := range sums {
					gws[i].Share([]mesh.Total{*s})
				}
			}
		}
		const whole, second = limit / (64 << 10), 16 // pieces in all; in a second
		total := use(0, 1) + use(1, 1)
		for range 300 { // one has three times as much to send as the other
			told()
			total += use(0, 3*second) + use(1, second)
			time.Sleep(time.Second)
		}
		back := whole * 300 / 3600 // what has come back meanwhile
		if most := whole + back + 8*second; total > most || total < whole*9/10 {
			t.Errorf("%d pieces were sent of %d, with %d that came back; at most %d", total, whole, back, most)
		}
		time.Sleep(2 * budgetTime)
		told() // forgets both
		use(0, 1)
		told()
		if n := use(0, whole); n < whole*9/10 {
			t.Errorf("%d pieces after two hours, want %d", n, whole)
		}
	})
}

// TestPursesAreForgotten also when one of its kinds has no limit, or has none any
// more.
func TestPursesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gateway
		ps := &g.tunnels.purses
		for _, b := range []mesh.Allowance{{Up: 1 << 20, Down: 1 << 20}, {Up: 1 << 20}} {
			tun := &tunnel{call: authz.Call{Src: billing}, how: mesh.Destination{Host: "x.test", Budget: b}}
			if err := ps.open(tun, time.Now()); err != nil {
				t.Fatal(err)
			}
			tun.down.Add(1000) // more than is seen
			if ref := tun.spend(false, 900); ref != nil {
				t.Fatal(ref)
			}
			ps.shut(tun)
		}
		if g.Demands(); len(ps.of) != 1 {
			t.Fatalf("%d purses", len(ps.of))
		}
		time.Sleep(2 * budgetTime)
		if g.Demands(); len(ps.of) != 0 {
			t.Errorf("%d purses are left", len(ps.of))
		}
	})
}

// TestWhatIsUsedMostIsToldFirst, whatever it is counted in; what is not told of has
// the first part.
func TestWhatIsUsedMostIsToldFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gateway
		tun := &tunnel{call: authz.Call{Src: billing}, how: mesh.Destination{Host: "x.test", Budget: mesh.Allowance{Up: 1 << 40, Conns: 4}}}
		if err := g.tunnels.purses.open(tun, time.Now()); err != nil {
			t.Fatal(err)
		}
		if ref := tun.spend(true, 1<<20); ref != nil {
			t.Fatal(ref)
		}
		list := g.Demands()
		if len(list) != 2 || list[0].Calls != 1 || list[1].Calls != 1<<10 {
			t.Fatalf("%+v, want one connection of four before a MiB of a TiB", list)
		}
		share := func(of ...mesh.Demand) (up, conns float64) {
			var totals []mesh.Total
			for _, d := range of {
				totals = append(totals, mesh.Total{Quota: d.Quota, Calls: uint64(d.Calls), Proxies: 1, Issuers: 1})
			}
			g.Share(totals)
			return tun.purse.part[bytesUp] / (1 << 40), tun.purse.part[connections]
		}
		if up, conns := share(list...); up != 1 || conns != 4 {
			t.Errorf("alone it may use %.2f of the bytes, and %.0f connections", up, conns)
		}
		if up, conns := share(list[0]); up != firstPart || conns != 4 {
			t.Errorf("not told of the bytes, it may use %.2f of them, and %.0f connections", up, conns)
		}
	})
}

// TestBudgetOfNames counts each name below a pattern once, opens no tunnel to more,
// and has nobody look more up.
func TestBudgetOfNames(t *testing.T) {
	w := newWorld(t, nil)
	rows := access + "p, many, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:*.many.test, *, CONNECT, -, -, allow\n"
	w.use(w.policy(rows, "  - host: \"*.many.test\"\n    proto: tcp\n    dns: real\n    private: [127.0.0.1/32]\n    budget: {names: 3}\n"))
	ask := func(name string) int { // none has an address: what counts is what DNS is asked for
		_, ref := dial1(w, billing, name+".many.test:5432")
		if ref == nil {
			t.Fatalf("%s is there", name)
		}
		return ref.status
	}
	for _, tt := range []struct {
		name string
		want int
	}{{"a", 502}, {"a", 502}, {"b", 429}, {"a", 502}} {
		if got := ask(tt.name); got != tt.want {
			t.Errorf("before the gateway knows its part, %s: %d, want %d", tt.name, got, tt.want)
		}
	}
	w.alone()
	for _, tt := range []struct {
		name string
		want int
	}{{"b", 502}, {"c", 502}, {"d", 429}, {"b", 502}} {
		if got := ask(tt.name); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	r := w.until("the refusal", denial(ReasonBudget))
	if !strings.Contains(r.Detail, "3 names in an hour for *.many.test") {
		t.Errorf("it says %q", r.Detail)
	}
	var ref *Refusal
	if _, err := w.gw.Addresses(t.Context(), billing, "e.many.test"); !errors.As(err, &ref) || ref.Reason != ReasonBudget {
		t.Errorf("looked up: %v", err)
	}
	if _, err := w.gw.Addresses(t.Context(), billing, "c.many.test"); !errors.Is(err, ErrNoHost) {
		t.Errorf("one that is known: %v", err)
	}
	if _, err := w.gw.Addresses(t.Context(), inventory, "e.many.test"); !errors.Is(err, ErrNoHost) {
		t.Errorf("for another workload: %v", err)
	}
}

// TestNamesComeBack evenly over the hour, and are remembered no longer.
func TestNamesComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &purse{at: time.Now()}
		p.use(mesh.Allowance{Names: 60})
		p.part[names] = 60
		for i := range 60 {
			if !p.takeName(fmt.Sprint(i), time.Now()) {
				t.Fatalf("name %d is refused", i)
			}
		}
		if p.takeName("more", time.Now()) {
			t.Error("one more is taken")
		}
		time.Sleep(time.Minute)
		p.touch(time.Now())
		if !p.takeName("more", time.Now()) || p.takeName("and more", time.Now()) || !p.takeName("0", time.Now()) {
			t.Error("after a minute there is not one more")
		}
		time.Sleep(budgetTime)
		p.touch(time.Now())
		if p.takeName("new", time.Now()); len(p.known) != 1 {
			t.Errorf("%d names are remembered", len(p.known))
		}
	})
}
