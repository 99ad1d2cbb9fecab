package http2

// answer takes in the field section of an answer.
func (c *Conn) answer(h header, l *Lane, s *section) error {
	if h.flags&flagEnd == 0 || !s.answer {
		return c.faulty(l, Protocol, Malformed)
	}
	return c.peerEnded(l)
}

// answered says whether the head of the answer is here, so that what comes next
// ends it.
func (l *Lane) answered() bool { return l.peerEnd }
