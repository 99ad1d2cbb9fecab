package http2

import "encoding/binary"

// maxContinuations bounds the frames of one field section.
const maxContinuations = 16

// section takes in a frame that begins a field section.
func (c *Conn) section(h header, p []byte) error {
	p, err := h.unpad(p)
	if err != nil {
		return err
	}
	if h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return violated(FrameSize, BadLength)
		}
		if binary.BigEndian.Uint32(p)&maxStream == h.stream {
			return violated(Protocol, BadStream)
		}
		p = p[5:]
	}
	if h.flags&flagEndHeaders != 0 {
		return c.sectionWhole(h, p)
	}
	in := &c.in
	in.opener, in.more = h, 0
	in.fragment = append(in.fragment[:0], p...)
	return nil
}

// continued takes in a frame that continues it.
func (c *Conn) continued(h header, p []byte) error {
	in := &c.in
	if in.more++; in.more > maxContinuations || len(in.fragment)+len(p) > 2*c.cfg.Head {
		return violated(EnhanceYourCalm, TooLarge)
	}
	in.fragment = append(in.fragment, p...)
	if h.flags&flagEndHeaders == 0 {
		return nil
	}
	h = in.opener
	in.opener = header{}
	err := c.sectionWhole(h, in.fragment)
	if cap(in.fragment) > keepFragment {
		in.fragment = nil
	}
	return err
}

// keepFragment is the size up to which the buffer of fragments is used again.
const keepFragment = 16 << 10

// sectionWhole takes in a field section: it begins a call, or ends one. One that
// nobody reads is decoded all the same: the table goes on.
func (c *Conn) sectionWhole(h header, block []byte) error {
	s := &c.in.block
	defer s.rest()
	if err := s.decode(block); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.streams[h.stream]
	switch {
	case l != nil && l.peerEnd:
		return c.fault(l, StreamClosed, AfterEnd)
	case l != nil && c.server:
		return c.trailers(h, l, s)
	case l != nil:
		return c.answer(h, l, s)
	case c.server && h.stream%2 == 0:
		return violated(Protocol, BadStream)
	case !c.isIdle(h.stream):
		return c.late(h)
	case !c.server:
		return violated(Protocol, BadStream)
	}
	return c.beginCall(h, s)
}

// late looks at a field section of a stream that is not there any more. One that
// was on its way when we ended the call is no mistake, but costs us its decoding.
// The lock of c is held.
func (c *Conn) late(h header) error {
	switch {
	case c.wasReset(h.stream):
		if h.flags&flagEnd != 0 {
			c.settleReset(h.stream)
		}
	case c.server && h.stream > c.lost:
		return violated(StreamClosed, AfterEnd)
	}
	c.earn()
	return c.noisy()
}

// trailers takes in the field section that ends a body. The lock of c is held.
func (c *Conn) trailers(h header, l *Lane, s *section) error {
	if h.flags&flagEnd == 0 || s.pseudo != 0 || s.bad {
		return c.fault(l, Protocol, Malformed)
	}
	if s.large {
		return c.fault(l, EnhanceYourCalm, TooLarge)
	}
	l.mu.Lock()
	l.got.tail = append(l.got.tail[:0], s.lines...)
	l.mu.Unlock()
	return c.peerEnded(l)
}
