package http2

// The first window of a connection cannot be refused: the protocol gives it to
// every client. But what lies in it and nobody reads is memory, of as many
// connections as there are. So it is paid for once it is more than a little, and
// a call whose data finds no memory left is broken off.

const (
	// spare is what a connection may hold unread for nothing.
	spare = 4 << 10
	// portion is how much is taken at once, so that a quick reader does not make
	// us count for each frame.
	portion = 4 << 10
)

// unread is how much has come, or was announced by a frame that has, and is not
// read yet.
func (c *Conn) unread() int { return int(c.room.Load() - c.inLeft.Load() - c.eaten.Load()) }

// due is what of that is to be paid for by First: what widen has taken is paid.
func (c *Conn) due() int {
	n := c.unread() - c.widened - spare
	if !c.server || n <= 0 {
		return 0
	}
	return (n + portion - 1) / portion * portion
}

// afford pays for what has come; false when there is no memory for it. The lock
// of c is held.
func (c *Conn) afford() bool {
	more := c.due() - c.paid
	if more <= 0 {
		return true
	}
	if !c.cfg.First.Take(more) {
		return false
	}
	c.paid += more
	return true
}

// repay gives back what was paid for data that was read since. The lock of c is
// held.
func (c *Conn) repay() {
	if n := c.paid - c.due(); n > 0 {
		c.cfg.First.Give(n)
		c.paid -= n
	}
}
