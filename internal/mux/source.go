package mux

import (
	"cmp"
	"container/list"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"
)

// A Source is where connections come from, as far as one peer cannot choose: an
// address, of IPv6 the network of 64 bits that one host is given.
type Source netip.Prefix

// SourceOf is that of an address.
func SourceOf(a net.Addr) Source {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return Source{} // those are all one
	}
	ip := t.AddrPort().Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits) // the zero one for no address
	return Source(p)
}

// An Anteroom bounds the connections of peers that have proved nothing yet. When
// it is full, the source that has most of them loses the one that has been there
// longest: an honest handshake takes milliseconds, and who floods crowds out
// himself. It is safe for concurrent use.
type Anteroom struct {
	max int

	mu  sync.Mutex // guards the fields below
	of  map[Source]*list.List
	n   int
	seq uint64
}

// A Place is that of one connection in an Anteroom.
type Place struct {
	from Source
	at   *list.Element
	seq  uint64
	out  func()
}

// NewAnteroom has room for so many.
func NewAnteroom(most int) *Anteroom {
	return &Anteroom{max: most, of: map[Source]*list.List{}}
}

// Enter takes a connection in and says whether another one had to go, whose out
// it has called. The order of calls is the order of arrival.
func (a *Anteroom) Enter(from Source, out func()) (p *Place, crowded bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seq++
	p = &Place{from: from, seq: a.seq, out: out}
	l := a.of[from]
	if l == nil {
		l = list.New()
		a.of[from] = l
	}
	p.at = l.PushBack(p)
	if a.n++; a.n <= a.max {
		return p, false
	}
	worst := a.worst()
	a.remove(worst)
	worst.out()
	return p, true
}

// worst is who has been here longest of the source that has most.
func (a *Anteroom) worst() (w *Place) {
	most := 0
	for _, l := range a.of {
		p := l.Front().Value.(*Place)
		if l.Len() > most || l.Len() == most && p.seq < w.seq {
			w, most = p, l.Len()
		}
	}
	return w
}

// Leave takes a connection out that has proved who it is, or has ended. It does
// nothing when that had to go.
func (a *Anteroom) Leave(p *Place) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.remove(p)
}

func (a *Anteroom) remove(p *Place) {
	if p.at == nil {
		return
	}
	l := a.of[p.from]
	l.Remove(p.at)
	p.at = nil
	if a.n--; l.Len() == 0 {
		delete(a.of, p.from)
	}
}

// Len is how many are there.
func (a *Anteroom) Len() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.n
}

// A Calm bounds how often each party may break off what it has begun, over all
// of its connections: who comes back on a new one finds no new patience. Parties
// are sources, or identities where one is proved: neighbours share an address. It
// is safe for concurrent use. The nil *Calm bounds nothing.
type Calm[K comparable] struct {
	burst, rate float64

	mu sync.Mutex // guards of
	of map[K]*patience
}

// A patience is what is left for one party.
type patience struct {
	left float64
	at   time.Time // when that was so
	slow bool      // less than half was left, and three quarters are not yet
	over bool      // all was
	next time.Time // when its next turn is, see Wait
}

// maxParties bounds the memory of a Calm. Beyond it those are forgotten who have
// broken off least.
const maxParties = 4096

// NewCalm bears so many at once, and so many in a second.
func NewCalm[K comparable](burst int, perSecond float64) *Calm[K] {
	return &Calm[K]{burst: float64(burst), rate: perSecond, of: map[K]*patience{}}
}

// Spend takes note of something broken off that costs so much; false when that
// is too much.
func (c *Calm[K]) Spend(who K, cost int) bool {
	if c == nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.look(who)
	if p == nil {
		if len(c.of) >= maxParties {
			c.sweep()
		}
		p = &patience{left: c.burst, at: time.Now()}
		c.of[who] = p
	}
	p.left = max(p.left-float64(cost), 0)
	p.slow, p.over = p.slow || p.left < c.burst/2, p.over || p.left == 0
	return !p.over
}

// Over says that a party has used its patience up. It takes a quarter of it to
// be let in again: else a flood would cost a handshake for every bit of it.
func (c *Calm[K]) Over(who K) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.look(who)
	return p != nil && p.over
}

// Worn says that a party has used up more than half of its patience.
func (c *Calm[K]) Worn(who K) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.look(who)
	return p != nil && p.left < c.burst/2
}

// Wait says how long a party that has been worn waits before it begins what may cost
// it so much, most at most: no more of that is begun than its patience bears, and none
// of it in a burst. It takes three quarters of the patience to wait no more.
func (c *Calm[K]) Wait(who K, cost int, most time.Duration) time.Duration {
	if c == nil {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.look(who)
	if p == nil || !p.slow {
		return 0
	}
	now := time.Now()
	wait := float64(max(p.next.Sub(now), 0)) + float64(cost)/c.rate*float64(time.Second)
	if !(wait <= float64(most)) { // nothing comes back where the rate is 0
		return most
	}
	p.next = now.Add(time.Duration(wait))
	return time.Duration(wait)
}

// look finds a party that has not got all of its patience.
func (c *Calm[K]) look(who K) *patience {
	p := c.of[who]
	if p == nil {
		return nil
	}
	now := time.Now()
	p.left, p.at = min(p.left+now.Sub(p.at).Seconds()*c.rate, c.burst), now
	p.slow, p.over = p.slow && p.left < 3*c.burst/4, p.over && p.left < c.burst/4
	if p.left == c.burst {
		delete(c.of, who)
		return nil
	}
	return p
}

// sweep forgets the parties that have recovered. Is there no room then, it also
// forgets an eighth of them, beginning with who has most patience left: whoever
// comes from many places to wipe the memory of what he has done at one wipes
// these places. Who is kept out comes last.
func (c *Calm[K]) sweep() {
	for who := range c.of {
		c.look(who)
	}
	if len(c.of) < maxParties {
		return
	}
	worse := func(a, b *patience) int {
		switch {
		case a.over != b.over && a.over:
			return 1
		case a.over != b.over:
			return -1
		}
		return cmp.Compare(b.left, a.left)
	}
	all := slices.SortedFunc(maps.Keys(c.of), func(a, b K) int { return worse(c.of[a], c.of[b]) })
	for _, who := range all[:maxParties/8] {
		delete(c.of, who)
	}
}

// Turns lets few goroutines at a time compute what takes long, such as a
// handshake, so that all others find a processor soon. Who waits for the peer
// gives its turn away meanwhile. The nil Turns lets everybody.
type Turns chan struct{}

// NewTurns lets half of the processors be taken.
func NewTurns() Turns { return make(Turns, max(runtime.GOMAXPROCS(0)/2, 1)) }

// Take waits for a turn.
func (t Turns) Take() {
	if t != nil {
		t <- struct{}{}
	}
}

// Give ends it.
func (t Turns) Give() {
	if t != nil {
		<-t
	}
}
