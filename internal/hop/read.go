package hop

import (
	"encoding/binary"
	"runtime"
	"sync"

	"sallyport/internal/mux"
)

const readBuffer = 32 << 10

// patience is how many bytes are kept for readers until these have had their turn:
// who reads the connection outruns them all as long as more comes, and what has
// just been read is still in the processor's cache.
const patience = 128 << 10

var readPool = sync.Pool{New: func() any { return new([readBuffer]byte) }}

// A reader is what only the goroutine that reads knows.
type reader struct {
	stream  *Stream // whose data frame is being read; nil: it is thrown away
	left    int     // payload bytes of it still to come
	kept    int     // bytes that nobody was ready to take, see patience
	end     bool    // it ends its direction
	greeted bool
	noise   mux.Bucket
	opens   mux.Bucket
	opened  []*Stream // which nobody knows of yet
}

// noiseBurst and noiseRate bound what costs us more than it costs the peer:
// calls broken off, pings, frames without content.
const (
	noiseBurst = 1000
	noiseRate  = 1000 // per second

	// opensRate bounds the streams that a peer opens, whatever is on them: each
	// costs a goroutine and buffers. Our own end opens few, since it uses a stream
	// for one call after the other. What is beyond is refused, which is noise.
	opensBurst = 4000
	opensRate  = 4000 // per second
)

// read takes frames in until the connection ends. While nothing comes it holds
// no buffer.
func (c *Conn) read() error {
	var buf []byte
	rest := func() {
		if buf != nil {
			readPool.Put((*[readBuffer]byte)(buf))
			buf = nil
		}
	}
	defer rest()
	r, w := 0, 0
	for {
		n, err := c.frames(buf[r:w])
		c.announce(err == nil)
		if err != nil {
			return err
		}
		if r += n; r == w {
			r, w = 0, 0
		} else {
			w = copy(buf, buf[r:w]) // less than a header and a small payload
			r = 0
		}
		if c.in.kept >= patience {
			c.in.kept = 0
			runtime.Gosched()
		}
		if c.waits != nil && w == 0 {
			rest()
			if err := c.waits.Await(); err != nil {
				return err
			}
		}
		if buf == nil {
			buf = readPool.Get().(*[readBuffer]byte)[:]
		}
		n, err = c.nc.Read(buf[w:])
		if n > 0 {
			c.heard.Add(1)
		} else if err != nil {
			return err
		}
		w += n
	}
}

// frames takes in what b holds and says how much that was.
func (c *Conn) frames(b []byte) (n int, err error) {
	in := &c.in
	for {
		if in.left > 0 {
			k := min(in.left, len(b)-n)
			if k == 0 {
				return n, nil
			}
			if err := c.data(b[n : n+k]); err != nil {
				return n, err
			}
			n += k
			continue
		}
		if len(b)-n < headerSize {
			return n, nil
		}
		h, err := parseHeader(b[n:])
		if err != nil {
			return n, err
		}
		if c.accept == nil && !in.greeted && h.kind != kindHello {
			return n, violated(BadHello)
		}
		if h.kind == kindData {
			n += headerSize
			if err := c.begin(h); err != nil {
				return n, err
			}
			continue
		}
		if len(b)-n < headerSize+h.length {
			return n, nil
		}
		if err := c.noted(h, b[n+headerSize:n+headerSize+h.length]); err != nil {
			return n, err
		}
		n += headerSize + h.length
	}
}

// data takes in payload of the data frame that is being read.
func (c *Conn) data(p []byte) error {
	in := &c.in
	in.left -= len(p)
	if in.stream == nil {
		return nil
	}
	if err := in.stream.deliver(p); err == errHoarded { //nolint:errorlint // made in deliver
		s := in.stream
		in.stream = nil // the rest is thrown away
		return c.hoarded(s)
	} else if err != nil {
		return err
	}
	if in.left == 0 && in.end {
		c.peerEnded(in.stream)
	}
	return nil
}

// begin looks at the header of a data frame.
func (c *Conn) begin(h header) error {
	in := &c.in
	in.left, in.end = h.length, h.flags&flagEnd != 0
	// Our own end opens a stream with the first bytes on it.
	if h.length == 0 && (h.flags == 0 || h.flags&flagOpen != 0) && !in.noise.Spend() {
		return violated(Flood)
	}
	s, err := c.find(h)
	if in.stream = s; err != nil || s == nil {
		return err
	}
	if h.length == 0 && in.end {
		c.peerEnded(s)
	}
	return nil
}

// find gives the stream of a data frame, a new one if it opens one; nil when
// nobody reads it any more.
func (c *Conn) find(h header) (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.flags&flagOpen != 0 {
		if c.accept == nil || h.stream <= c.last {
			return nil, violated(BadStream)
		}
		c.last = h.stream
		return c.take(h)
	}
	if h.stream > c.last {
		return nil, violated(BadStream)
	}
	s := c.streams[h.stream]
	if s != nil && s.peerEnd {
		return nil, violated(AfterEnd)
	}
	return s, nil
}

// take takes a stream in, for announce, or refuses it.
func (c *Conn) take(h header) (*Stream, error) {
	if !c.in.opens.Spend() {
		if !c.in.noise.Spend() {
			return nil, violated(Flood)
		}
		return nil, c.say(resetFrame(h.stream, resetRefused))
	}
	if c.err == nil && !c.leaving && len(c.held) < c.cfg.Streams {
		s := c.hold()
		s.id = h.stream
		c.streams[s.id] = s
		c.in.opened = append(c.in.opened, s)
		return s, nil
	}
	return nil, c.say(resetFrame(h.stream, resetRefused))
}

// announce tells of the new streams, once for all that came together: one that
// is broken off behind its very beginning costs nobody a goroutine. When the
// connection does not go on, they are refused.
func (c *Conn) announce(goesOn bool) {
	in := &c.in
	for i, s := range in.opened {
		in.opened[i] = nil
		c.mu.Lock()
		s.known = goesOn && !s.closed
		known := s.known
		c.mu.Unlock()
		if !known || !c.accept(s) {
			_ = s.Refuse() // it never fails
		}
	}
	in.opened = in.opened[:0]
}

// say queues a frame in answer to the peer, who has to read such answers.
func (c *Conn) say(n note) error {
	if !c.out.control(n) {
		return violated(Unread)
	}
	c.out.wake()
	return nil
}

// peerEnded is the end of what the peer sends on a stream.
func (c *Conn) peerEnded(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.peerEnd = true
	s.atEnd()
	if s.ended {
		c.forget(s)
	}
}

// noted takes in a frame other than data.
func (c *Conn) noted(h header, p []byte) error {
	var value uint64
	if len(p) == 8 {
		value = binary.BigEndian.Uint64(p)
	} else {
		value = uint64(binary.BigEndian.Uint32(p))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch h.kind {
	case kindHello:
		if c.accept != nil || c.in.greeted || value == 0 || value > maxStream {
			return violated(BadHello)
		}
		c.in.greeted = true
		c.limit = int(value)
	case kindWindow:
		return c.granted(h.stream, value)
	case kindReset:
		return c.wasReset(h.stream, value)
	case kindPing:
		if !c.in.noise.Spend() {
			return violated(Flood)
		}
		return c.say(note{kindPong, 0, value})
	case kindPong:
		if c.pings == 0 || value != pingWord {
			return violated(Unexpected)
		}
		c.pings--
	case kindGoaway:
		if value != goDrain && value != goViolation {
			return violated(BadCode)
		}
		if c.leaving && !c.in.noise.Spend() {
			return violated(Flood)
		}
		c.leaving = true
		c.parting()
	}
	return nil
}

// granted lets a stream send more.
func (c *Conn) granted(stream uint32, n uint64) error {
	if stream > c.last {
		return violated(BadStream)
	}
	s := c.streams[stream]
	switch {
	case n == 0 || n > maxCredit:
		return violated(BadWindow)
	case s == nil:
		return nil
	case int64(s.credit)+int64(n) > maxCredit:
		return violated(BadWindow)
	}
	s.credit += int(n)
	s.room.Broadcast()
	return nil
}

// wasReset ends a stream on behalf of the peer. It gives the lock up for what OnCut set.
func (c *Conn) wasReset(stream uint32, code uint64) error {
	if stream > c.last {
		return violated(BadStream)
	}
	s := c.streams[stream]
	// What this end opened itself is no flood, and neither is the end of a
	// stream that carries no call.
	working := c.accept != nil && s.working()
	if (working || s == nil) && !c.in.noise.Spend() || working && !c.cfg.Broken() {
		return violated(Flood)
	}
	var err error
	switch code {
	case resetCancel:
		err = ErrCancelled
	case resetRefused:
		err = ErrRefused
	default:
		return violated(BadCode)
	}
	if s == nil {
		return nil
	}
	c.cutOff(s, err)
	return nil
}

// cutOff ends a stream at this end. It gives the lock up for what OnCut set.
func (c *Conn) cutOff(s *Stream, err error) {
	s.broke(err)
	c.forget(s)
	f := s.cut
	if c.accept != nil && !s.known {
		f = func() { s.Close() }
	}
	if f != nil {
		c.mu.Unlock()
		f()
		c.mu.Lock()
	}
}
