package route

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/bits"
	"strings"

	"sallyport/internal/mesh"
)

// Levels is how many priorities the route has backends of.
func (c *Choice) Levels() int {
	if c.Route == nil {
		return 0
	}
	return len(c.Route.levels)
}

// Backend chooses a backend of a priority, 0 first; nil when there is none, or
// the route has an end of its own.
//
// The choice is by weighted rendezvous: the backend with the least
// -ln(hash)/weight has the call. Each gets its weight's part of all keys, and a
// larger weight can only make its own score less: it takes over keys of others
// and moves none between them.
func (c *Choice) Backend(level int) *Backend {
	r := c.Route
	if r == nil || r.Redirect != nil || r.Respond != nil || level >= len(r.levels) {
		return nil
	}
	list := r.levels[level]
	if len(list) == 1 {
		return &list[0]
	}
	best, least := 0, math.Inf(1)
	for i := range list {
		if s := score(c.key, &list[i]); s < least {
			best, least = i, s
		}
	}
	return &list[best]
}

func score(key uint64, b *Backend) float64 {
	// (0, 1): the upper 53 bits, and never 0, of which there is no logarithm.
	u := (float64(mix(key^b.seed)>>11) + 0.5) / (1 << 53)
	return -math.Log(u) / b.weight
}

// keyOf is by what the call stays with its backend.
func (r *Route) keyOf(c *Call) (key uint64, kept bool) {
	if r.Sticky != nil {
		if v, ok := valueOf(r.Sticky, c); ok {
			return hash(r.salt, v), true
		}
	}
	return hash(r.salt, c.Trace[:]), false
}

// Key is the hash of what a call is to be kept together by; without such a value
// it is by the trace.
func Key(s *mesh.Sticky, c *Call) uint64 {
	if s != nil {
		if key, ok := valueOf(s, c); ok {
			return hash(0, key)
		}
	}
	return hash(0, c.Trace[:])
}

func valueOf(s *mesh.Sticky, c *Call) (key []byte, ok bool) {
	switch s.By {
	case "header":
		for i := range c.Fields {
			if f := &c.Fields[i]; len(f.Name) == len(s.Name) && bytes.EqualFold(f.Name, []byte(s.Name)) {
				return f.Value, len(f.Value) > 0
			}
		}
	case "cookie":
		return c.cookie(s.Name)
	case "claim":
		if c.Claim != nil {
			c.text = append(c.text[:0], c.Claim(s.Name)...)
			return c.text, len(c.text) > 0
		}
	case "caller":
		c.text = append(c.text[:0], c.Caller...)
		return c.text, len(c.text) > 0
	}
	return nil, false
}

// AppendPath appends what a path becomes: another one, or another prefix for the
// n bytes that matched.
func AppendPath(b, path []byte, whole, prefix string, n int) []byte {
	if whole != "" {
		return append(b, whole...)
	}
	b = append(b, strings.TrimRight(prefix, "/")...)
	b = append(b, path[n:]...)
	if len(b) == 0 {
		b = append(b, '/')
	}
	return b
}

// cookie is the value of a cookie, the first of that name.
func (c *Call) cookie(name string) ([]byte, bool) {
	for i := range c.Fields {
		f := &c.Fields[i]
		if len(f.Name) != len("cookie") || !equalFold(f.Name, "cookie") {
			continue
		}
		for rest := f.Value; len(rest) > 0; {
			var pair []byte
			pair, rest, _ = bytes.Cut(rest, []byte{';'})
			pair = bytes.TrimSpace(pair)
			if len(pair) > len(name) && pair[len(name)] == '=' && string(pair[:len(name)]) == name {
				return pair[len(name)+1:], len(pair) > len(name)+1
			}
		}
	}
	return nil, false
}

// hash is a hash that is the same in every process: each proxy makes the same
// choice. It is fast and no secret: who may choose the key may choose the side.
func hash(seed uint64, b []byte) uint64 {
	const k0, k1 = 0xa0761d6478bd642f, 0xe7037ed1a0b428db
	h := seed ^ k0 ^ uint64(len(b))*k1
	for len(b) >= 8 {
		hi, lo := bits.Mul64(h^binary.LittleEndian.Uint64(b)^k1, k0)
		h = hi ^ lo
		b = b[8:]
	}
	var tail uint64
	for i, c := range b {
		tail |= uint64(c) << (8 * i)
	}
	return mix(h ^ tail ^ uint64(len(b))<<56)
}

// mix is the finalizer of SplitMix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
