package hop

import "errors"

// A stream has its first window without asking. But what lies in it and nobody
// reads is memory, of as many streams as there are. So it is paid for once it is
// more than a little, and a stream whose data finds no memory left is broken off.

const (
	// spare is what a stream may hold unread for nothing.
	spare = 2 << 10
	// portion is how much is taken at once, so that a quick reader does not make
	// us count for each frame.
	portion = 4 << 10
)

// errHoarded says that there is no memory for what has come.
var errHoarded = errors.New("data that nobody reads")

// due is what of n bytes that are not read is to be paid for by First: what the
// window has grown by is paid. The lock of s is held.
func (s *Stream) due(n int) int {
	if n -= s.window - baseWindow + spare; n <= 0 {
		return 0
	}
	return (n + portion - 1) / portion * portion
}

// keep keeps p for a reader, if there is memory for it. The lock of s is held.
func (s *Stream) keep(p []byte) error {
	if more := s.due(s.in.Len()+len(p)) - s.paid; more > 0 {
		if !s.c.cfg.First.Take(more) {
			return errHoarded
		}
		s.paid += more
	}
	s.in.Add(p)
	s.c.in.kept += len(p)
	return nil
}

// repay gives back what was paid for data that was read since. The lock of s is
// held.
func (s *Stream) repay() {
	if n := s.paid - s.due(s.in.Len()); n > 0 {
		s.c.cfg.First.Give(n)
		s.paid -= n
	}
}

// hoarded ends a stream whose data nobody reads. Who makes us end many pays for
// it as for those that he breaks off himself, unless others have the memory.
func (c *Conn) hoarded(s *Stream) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams[s.id] != s {
		return nil // it was ended meanwhile
	}
	c.cfg.Hoarded()
	s.spared = !c.cfg.First.Spent(baseWindow) // the most that he may have been refused
	if err := c.say(resetFrame(s.id, resetCancel)); err != nil {
		return err
	}
	c.cutOff(s, ErrCancelled)
	if c.accept != nil && !s.spared && !c.cfg.Broken() {
		return violated(Flood)
	}
	return nil
}
