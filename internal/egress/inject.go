package egress

import (
	"fmt"

	"sallyport/internal/http1"
)

// inject adds the credential that the destination asks for to what is sent. It
// fails rather than send the bare request.
func (f *fetch) inject() error {
	i, x := f.how.Inject, &f.a.ex
	if i == nil {
		return nil
	}
	// Whatever the workload says there, the host takes its word from us alone.
	x.ToUp.Also = http1.NewNameSet(i.Header)
	if !i.For(f.call.Path) {
		return nil
	}
	if f.grant.Softened() {
		return refuse(ReasonSecret, "the request is denied by a policy that is not enforced, which lends no credential")
	}
	value, err := f.g.cfg.Secrets.Value(f.ctx, i.Secret)
	if err != nil {
		return refuse(ReasonSecret, "%v", err)
	}
	f.secret = i.Secret
	// What comes back must be whole and plain, or the secret could come in it unseen.
	x.ToUp.Also = http1.NewNameSet(i.Header, "accept-encoding", "grpc-accept-encoding", "te", "range", "if-range")
	x.ToUp.Extra = fmt.Appendf(nil, "%s: %s%s\r\n", i.Header, i.Prefix, value)
	x.Scrub = http1.NewScrub(value)
	return nil
}

// codings name the fields that say how a body is coded.
var codings = http1.NewNameSet("content-encoding", "grpc-encoding")

// scrub takes the credential out of the head of an answer that shows it. It is
// false for one in which it could not be seen.
func (f *fetch) scrub(resp *http1.Response) bool {
	s := f.a.ex.Scrub
	if s == nil {
		return true
	}
	s.Clean(resp.Phrase)
	for _, field := range resp.Fields {
		coded := codings.Has(field.Name) // of the name as it came
		s.Clean(field.Name)
		s.Clean(field.Value)
		if coding := string(field.Value); coded && coding != "" && coding != "identity" {
			f.note = "the answer is " + clip(coding) + ", though a plain one was asked for: what was injected could be in it unseen"
			return false
		}
	}
	return true
}

// plain is a text for a record without the credential. It must not be cut before: a
// part of that would not be found.
func (f *fetch) plain(text string) string {
	s := f.a.ex.Scrub
	if s == nil {
		return text
	}
	b := []byte(text)
	s.Clean(b)
	return string(b)
}
