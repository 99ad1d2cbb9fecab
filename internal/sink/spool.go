package sink

import "sallyport/internal/audit"

// Report tells the spool how far each sink has come, now and from then on: what
// a cursor on the disk has passed.
func Report(sinks []*Sink, spool *audit.Spool) {
	for _, s := range sinks {
		s.reader = spool.Reader("sink "+s.name, s.Sent())
	}
}
