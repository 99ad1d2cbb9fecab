package http2

import "encoding/binary"

// noted takes in a frame other than data.
func (c *Conn) noted(h header, p []byte) error {
	switch h.kind {
	case kindHeaders:
		return c.section(h, p)
	case kindContinuation:
		return c.continued(h, p)
	case kindSettings:
		return c.settings(h, p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch h.kind {
	case kindPriority:
		if binary.BigEndian.Uint32(p)&maxStream == h.stream {
			return violated(Protocol, BadStream)
		}
		return c.noisy()
	case kindReset:
		return c.peerReset(h.stream, Code(binary.BigEndian.Uint32(p)))
	case kindPing:
		return c.pinged(h, p)
	case kindGoaway:
		return c.peerLeaves(binary.BigEndian.Uint32(p)&maxStream, Code(binary.BigEndian.Uint32(p[4:])))
	case kindWindow:
		return c.granted(h.stream, int(binary.BigEndian.Uint32(p)&maxWindow))
	}
	return c.noisy() // a kind that we do not know means nothing
}

func (c *Conn) pinged(h header, p []byte) error {
	word := binary.BigEndian.Uint64(p)
	if h.flags&flagAck != 0 {
		if word == drainWord && c.leaving == warned {
			c.gone() // what the peer sent before it heard of the end is here
			return nil
		}
		return c.noisy()
	}
	if err := c.noisy(); err != nil {
		return err
	}
	was := len(c.out.pend)
	c.out.pend = appendPing(c.out.pend, flagAck, word)
	return c.out.answered(was)
}

// granted lets a lane, or all of them together, send more.
func (c *Conn) granted(stream uint32, n int) error {
	c.earn()
	if err := c.noisy(); err != nil {
		return err
	}
	if stream == 0 {
		if n == 0 {
			return violated(Protocol, BadWindow)
		}
		if c.credit += n; c.credit > maxWindow {
			return violated(FlowControl, BadWindow)
		}
		for i, l := range c.thirsty {
			l.thirsts = false
			l.room.Signal()
			c.thirsty[i] = nil
		}
		c.thirsty = c.thirsty[:0]
		return nil
	}
	l := c.streams[stream]
	switch {
	case l == nil && c.isIdle(stream):
		return violated(Protocol, BadStream)
	case l == nil:
		return nil
	case n == 0:
		return c.fault(l, Protocol, BadWindow)
	}
	if l.credit += n; l.credit > maxWindow {
		return c.fault(l, FlowControl, BadWindow)
	}
	l.room.Signal()
	return nil
}

// peerReset ends a call on behalf of the peer. It gives the lock up for what OnCut set.
func (c *Conn) peerReset(stream uint32, code Code) error {
	l := c.streams[stream]
	if l == nil {
		if c.isIdle(stream) {
			return violated(Protocol, BadStream)
		}
		c.settleReset(stream)
		return c.noisy()
	}
	if c.server {
		if err := c.broken(); err != nil {
			return err
		}
	}
	c.cut(l, resetError(code))
	return nil
}

// peerLeaves takes in that the peer takes no new streams, and has acted on none
// behind last.
func (c *Conn) peerLeaves(last uint32, _ Code) error {
	if c.leaving != staying {
		if err := c.noisy(); err != nil {
			return err
		}
	}
	if c.server {
		if c.leaving == staying {
			c.leaving = gone // it opens no new ones
		}
		c.parting()
		return nil
	}
	c.leaving = gone
	for id, l := range c.streams {
		if id > last {
			l.broke(ErrRefused) // first: with the last call the connection may end
			c.forget(l)
		}
	}
	c.parting()
	return nil
}

// settings takes in what the peer says of itself.
func (c *Conn) settings(h header, p []byte) error {
	if c.in.settled {
		if err := c.noisy(); err != nil {
			return err
		}
	}
	c.in.settled = true
	if h.flags&flagAck != 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch binary.BigEndian.Uint16(p) {
		case settingPush:
			if v > 1 || v == 1 && !c.server {
				return violated(Protocol, BadSetting)
			}
		case settingStreams:
			c.limit = int(min(v, maxStream))
		case settingWindow:
			if v > maxWindow {
				return violated(FlowControl, BadSetting)
			}
			if err := c.shift(int(v)); err != nil {
				return err
			}
		case settingFrame:
			if v < maxPayload || v > 1<<24-1 {
				return violated(Protocol, BadSetting)
			}
		case settingExtended:
			if v > 1 {
				return violated(Protocol, BadSetting)
			}
			c.extended.Store(v == 1)
		}
	}
	was := len(c.out.pend)
	c.out.pend = appendSettingsAck(c.out.pend)
	return c.out.answered(was)
}

// shift changes what the peer lets us send on each stream (RFC 9113 section
// 6.9.2).
func (c *Conn) shift(first int) error {
	for _, l := range c.streams {
		if l.credit += first - c.first; l.credit > maxWindow {
			return violated(FlowControl, BadWindow)
		}
		l.room.Signal()
	}
	c.first = first
	return nil
}
