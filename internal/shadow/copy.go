package shadow

import (
	"slices"
	"time"

	"sallyport/internal/archive"
	"sallyport/internal/mesh"
)

// A Copy is one call as it passes, for all its shadows. It is the Tee of the
// exchange; End must follow.
type Copy struct {
	m       *Mirror
	shadows []*mesh.Shadow
	call    Call
	// answers says that somebody wants to see the primary's answer.
	answers          bool
	request, primary *tape
}

// Copy begins the copy of a call for those of its shadows that have room for one
// now; nil when none has. What nobody would take costs the call nothing.
func (m *Mirror) Copy(shadows []*mesh.Shadow, call Call) *Copy {
	shadows = slices.DeleteFunc(shadows, func(s *mesh.Shadow) bool { return m.full(s, &call) })
	if len(shadows) == 0 {
		return nil
	}
	c := &Copy{m: m, shadows: shadows, call: call, request: m.tape(), primary: m.tape()}
	for _, s := range shadows {
		c.answers = c.answers || s.Compare || s.Archive != ""
	}
	return c
}

// Again is that of http1.Tee.
func (c *Copy) Again() {
	c.request.rewind()
	c.primary.rewind()
}

// Sent is that of http1.Tee.
func (c *Copy) Sent(b []byte) { c.request.add(b) }

// Hinted is that of http1.Tee: a shadow is compared by what it answers in the end.
func (c *Copy) Hinted([]byte) {}

// Answered is that of http1.Tee.
func (c *Copy) Answered(b []byte) {
	if c.answers {
		c.primary.add(b)
	}
}

// End hands the copy over. Whole says that all of the request was sent,
// answered that the client has all of the answer.
func (c *Copy) End(whole, answered bool) {
	lost := c.request.lost()
	if lost == "" && !whole {
		lost = outcomeCut
	}
	if !answered {
		c.primary.lose(outcomeCut)
	}
	took := time.Since(c.call.Start)
	held := &shared{left: len(c.shadows), copy: c}
	for _, s := range c.shadows {
		switch {
		case lost != "":
			c.m.count(s, lost)
			held.done()
		default:
			c.m.offer(&job{c, s, took, held})
		}
	}
}

// release gives back what the copy holds.
func (c *Copy) release() {
	c.request.release()
	c.primary.release()
}

// A job is the copy for one shadow.
type job struct {
	*Copy
	shadow *mesh.Shadow
	took   time.Duration // the primary's
	held   *shared
}

// light is the size of calls that are looked at without waiting for others,
// bytes.
const light = 256 << 10

// run sends the copy, compares, and hands over the record.
func (j *job) run(l *lane) {
	m, s := j.m, j.shadow
	shadow := m.send(l.ctx, j, s.Service)
	defer shadow.release()
	m.count(s, shadow.outcome)
	if shadow.outcome == outcomeUnreachable {
		l.rests()
	}
	if !s.Compare && s.Archive == "" {
		return
	}
	var second *sending
	if s.Compare && s.Noise != nil && Safe([]byte(j.call.Method)) && shadow.outcome == outcomeAnswered {
		second = m.send(l.ctx, j, *s.Noise)
		defer second.release()
	}
	if j.request.length()+j.primary.length()+shadow.answer.length() > light {
		m.heavy.Lock() // one at a time: what is taken apart takes many times its size
		defer m.heavy.Unlock()
	}
	a, b := readAnswer(j.primary, j.call.Method), shadow.read(j.call.Method)
	var differs []Difference
	if s.Compare && a != nil && b != nil {
		differs = j.compare(a, b, second)
	}
	if s.Archive != "" && m.cfg.Archive != nil {
		m.cfg.Archive(s.Archive, j.record(a, b, shadow, differs))
	}
}

// compare counts in what the answers differ, and what two primaries do.
func (j *job) compare(a, b *archive.Answer, second *sending) []Difference {
	differs := Compare(a, b, j.shadow.Ignore)
	var noise []Difference
	learned := false
	if second != nil {
		if c := second.read(j.call.Method); c != nil {
			noise, learned = Compare(a, c, j.shadow.Ignore), true
		}
	}
	call := Seen{Route: j.call.Route, Shadow: j.shadow.Name, Method: j.call.Method, Path: j.call.Path, Trace: j.call.Trace.String()}
	j.m.report.Add(call, differs, noise, learned, j.m.cfg.Redact)
	return differs
}

// record joins all that is known of the call.
func (j *job) record(primary, shadow *archive.Answer, sent *sending, differs []Difference) *archive.Record {
	r := &archive.Record{
		Time: j.call.Start.UTC(), Trace: j.call.Trace.String(), Route: j.call.Route, Name: j.shadow.Name,
		Src: j.call.Src, Dst: j.call.Dst, ShadowDst: string(j.call.of(j.shadow.Service).Service),
		Request: readRequest(j.request), Primary: primary, Shadow: shadow,
		PrimaryMicros: j.took.Microseconds(), ShadowMicros: sent.took.Microseconds(),
	}
	if shadow == nil {
		r.Failed = sent.outcome
	}
	for _, d := range differs {
		r.Differs = append(r.Differs, d.Field)
	}
	return r
}
