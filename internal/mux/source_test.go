package mux

import (
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func source(t *testing.T, text string) Source {
	t.Helper()
	return SourceOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(text)))
}

func TestSourceIsWhatAPeerCannotChoose(t *testing.T) {
	for a, b := range map[string]string{
		"192.0.2.1:1":          "192.0.2.1:2",
		"[::ffff:192.0.2.1]:1": "192.0.2.1:2",
		"[2001:db8::1]:1":      "[2001:db8:0:0:ffff::9]:2",
		"[fe80::1%eth0]:1":     "[fe80::2%eth1]:2",
	} {
		if source(t, a) != source(t, b) {
			t.Errorf("%s and %s are two sources", a, b)
		}
	}
	for a, b := range map[string]string{
		"192.0.2.1:1":     "192.0.2.2:1",
		"[2001:db8::1]:1": "[2001:db8:0:1::1]:1",
		"[::1]:1":         "127.0.0.1:1",
	} {
		if source(t, a) == source(t, b) {
			t.Errorf("%s and %s are one source", a, b)
		}
	}
	if SourceOf(&net.UnixAddr{}) != SourceOf(nil) {
		t.Error("what has no address is not one source")
	}
}

// Who floods crowds out himself; with as many everywhere the oldest goes.
func TestAnteroom(t *testing.T) {
	a := NewAnteroom(3)
	var out []string
	enter := func(name, from string) *Place {
		p, _ := a.Enter(source(t, from), func() { out = append(out, name) })
		return p
	}
	honest := enter("honest", "192.0.2.1:1")
	for _, name := range []string{"a", "b", "c", "d"} {
		enter(name, "192.0.2.66:1")
	}
	if got := len(out); got != 2 || out[0] != "a" || out[1] != "b" || a.Len() != 3 {
		t.Fatalf("%v had to go, %d are there", out, a.Len())
	}
	a.Leave(honest)
	a.Leave(honest)
	if a.Len() != 2 {
		t.Fatalf("%d are there", a.Len())
	}
	a = NewAnteroom(2)
	out = nil
	enter("old", "192.0.2.1:1")
	enter("older than the last", "192.0.2.2:1")
	if _, crowded := a.Enter(source(t, "192.0.2.3:1"), func() {}); !crowded || len(out) != 1 || out[0] != "old" {
		t.Errorf("%v had to go", out)
	}
	for range 100 {
		p, _ := a.Enter(source(t, "192.0.2.9:1"), func() {})
		a.Leave(p)
	}
	if a.Len() > 2 || len(a.of) > 2 {
		t.Errorf("%d are there, of %d sources", a.Len(), len(a.of))
	}
}

func TestCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCalm[Source](100, 100)
		from, other := source(t, "192.0.2.1:1"), source(t, "192.0.2.2:1")
		for range 99 {
			if !c.Spend(from, 1) {
				t.Fatal("too much before it is")
			}
		}
		if c.Over(from) || c.Spend(from, 1) || !c.Over(from) || c.Over(other) || !c.Spend(other, 10) {
			t.Error("one source has not had its patience, or another one has")
		}
		time.Sleep(240 * time.Millisecond)
		if !c.Over(from) || c.Spend(from, 1) {
			t.Error("it is let in again at once")
		}
		time.Sleep(20 * time.Millisecond)
		if c.Over(from) {
			t.Error("it is kept out for long")
		}
		time.Sleep(time.Second)
		if c.Over(from) || c.Over(other) || len(c.of) != 0 {
			t.Errorf("%d sources are remembered for nothing", len(c.of))
		}
		for i := range 3 * maxParties {
			c.Spend(Source(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)), 1)
		}
		if len(c.of) > maxParties {
			t.Errorf("%d sources are remembered", len(c.of))
		}
		if (*Calm[Source])(nil).Over(from) || !(*Calm[Source])(nil).Spend(from, 1) {
			t.Error("nil bounds something")
		}
	})
}

// Who floods from one place and then shows up at as many others as are
// remembered is remembered all the same.
func TestCalmForgetsNoOffender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCalm[int](100, 1)
		for who := range 10 {
			c.Spend(who, 100)
		}
		c.Spend(10, 99) // not kept out, and nearly
		for i := range 4 * maxParties {
			c.Spend(100+i, 1+i%50)
		}
		for who := range 10 {
			if !c.Over(who) {
				t.Errorf("%d is let in again", who)
			}
		}
		if c.Spend(10, 1) {
			t.Error("what another one has broken off is forgotten")
		}
		if len(c.of) > maxParties {
			t.Errorf("%d parties are remembered", len(c.of))
		}
		for i := range 2 * maxParties { // nobody but offenders: there is room still
			c.Spend(-1-i, 100)
		}
		if len(c.of) > maxParties || !c.Over(-2*maxParties) {
			t.Errorf("%d offenders are remembered, the last one: %v", len(c.of), c.Over(-2*maxParties))
		}
	})
}

func TestTurns(t *testing.T) {
	was := runtime.GOMAXPROCS(1) // as it is after an idle start
	turns := NewTurns()
	runtime.GOMAXPROCS(was)
	most := max(min(was, runtime.NumCPU())/2, 1)
	if cap(turns) != most {
		t.Errorf("%d turns, want %d", cap(turns), most)
	}
	var all sync.WaitGroup
	for range 10 * most {
		all.Go(func() {
			turns.Take()
			defer turns.Give()
			if n := len(turns); n > most {
				t.Errorf("%d at a time", n)
			}
		})
	}
	all.Wait()
	Turns(nil).Take()
	Turns(nil).Give()
}

func TestCalmIsWornBeforeItIsOver(t *testing.T) {
	c := NewCalm[string](100, 0)
	for spent, want := range map[int]bool{50: false, 51: true, 99: true, 100: true} {
		who := string(rune(spent))
		c.Spend(who, spent)
		if got := c.Worn(who); got != want {
			t.Errorf("with %d of 100 spent: %v", spent, got)
		}
		if got := c.Over(who); got != (spent == 100) {
			t.Errorf("with %d of 100 spent: over is %v", spent, got)
		}
	}
	if c.Worn("another") || (*Calm[string])(nil).Worn("another") {
		t.Error("worn by nobody")
	}
}

// Who has used up half of his patience gets turns, no more than it bears, until three
// quarters are there again.
func TestCalmMakesTheWornWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCalm[string](100, 10)
		waits := func(about string, want ...time.Duration) {
			t.Helper()
			for _, w := range want {
				if got := c.Wait("a", 5, 2*time.Second); got != w {
					t.Errorf("%s: %v, want %v", about, got, w)
				}
			}
		}
		const s = time.Second
		waits("a stranger", 0)
		c.Spend("a", 50)
		waits("with half of it", 0)
		c.Spend("a", 5) // 45 are left
		waits("with less", s/2, s, 3*s/2, 2*s, 2*s, 2*s)
		if got := c.Wait("b", 5, s); got != 0 {
			t.Errorf("another one: %v", got)
		}
		time.Sleep(s)
		waits("a second later", 3*s/2, 2*s, 2*s)
		time.Sleep(2*s - time.Millisecond) // 74.99
		if waits("with less than three quarters", s/2+time.Millisecond); c.Worn("a") {
			t.Error("worn with more than half")
		}
		time.Sleep(time.Millisecond)
		waits("with three quarters", 0)
	})
	if got := (*Calm[string])(nil).Wait("a", 1, time.Second); got != 0 {
		t.Errorf("nobody's patience: %v", got)
	}
	never := NewCalm[string](100, 0)
	never.Spend("a", 100)
	if got := never.Wait("a", 0, time.Second); got != time.Second {
		t.Errorf("what never comes back: %v", got)
	}
}
