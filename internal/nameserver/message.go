package nameserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// answer answers any message, by way of miekg/dns. Nothing is returned for what
// is no question, so that two servers never keep each other busy. Stream says
// that the answer may be as long as it is.
func (a *answerer) answer(ctx context.Context, in []byte, stream bool) (out []byte, r Result) {
	a.met = nil
	if len(in) < headSize || in[2]&0x80 != 0 {
		return nil, Badly
	}
	defer func() {
		if p := recover(); p != nil {
			a.names.cfg.Log.Error("answering panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			out, r = bare(in, dns.RcodeServerFailure), Failed
		}
	}()
	if in[2]>>3&0xf != dns.OpcodeQuery {
		return bare(in, dns.RcodeNotImplemented), Badly
	}
	var q dns.Msg
	wire, ok := walk(in)
	if !ok || q.Unpack(in) != nil || len(q.Question) != 1 {
		return bare(in, dns.RcodeFormatError), Badly
	}
	opt, ok := optOf(&q)
	if !ok || q.Truncated || q.Question[0].Qtype == dns.TypeOPT {
		return bare(in, dns.RcodeFormatError), Badly
	}
	m := new(dns.Msg)
	m.SetReply(&q)
	m.Authoritative, m.RecursionAvailable = true, true
	most := minSize
	if opt != nil {
		most = min(maxSize, max(minSize, int(opt.UDPSize())))
		own := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		own.SetUDPSize(maxSize)
		own.SetDo(opt.Do())
		m.Extra = []dns.RR{own}
	}
	if stream {
		most = dns.MaxMsgSize
	}
	switch t := q.Question[0].Qtype; {
	case opt != nil && opt.Version() != 0:
		m.Rcode, r = dns.RcodeBadVers, Badly
	case q.Question[0].Qclass != dns.ClassINET, t == dns.TypeAXFR, t == dns.TypeIXFR, t == dns.TypeTKEY, t == dns.TypeTSIG:
		m.Rcode, r = dns.RcodeRefused, Badly
	default:
		if r = a.reply(ctx, wire, m); r == Dropped {
			return nil, r
		}
	}
	m.Truncate(most)
	out, err := m.Pack()
	if err != nil {
		a.names.cfg.Log.Error("an answer cannot be written", "err", err)
		return bare(in, dns.RcodeServerFailure), Failed
	}
	return out, r
}

// bare is an answer without anything but a code.
func bare(in []byte, code byte) []byte {
	out := make([]byte, headSize)
	copy(out, in[:4])
	out[2] = 0x80 | in[2]&0x79 // the opcode and RD
	out[3] = flagRA | code
	return out
}

// walk sees that a message has exactly one question, nothing in place of an
// answer, and nothing but what its counts say, which miekg/dns does not. It
// returns the name in lower case; one that points elsewhere is none.
func walk(in []byte) (wire []byte, ok bool) {
	if binary.BigEndian.Uint16(in[4:]) != 1 || binary.BigEndian.Uint32(in[6:]) != 0 {
		return nil, false
	}
	i := headSize
	for {
		if i >= len(in) || in[i] > 63 || i-headSize >= maxName {
			return nil, false
		}
		l := int(in[i])
		if i += 1 + l; l == 0 {
			break
		}
	}
	if i-headSize > maxName || i+4 > len(in) {
		return nil, false
	}
	wire = lower(in[headSize:i])
	i += 4
	for range binary.BigEndian.Uint16(in[10:]) {
		if i, ok = record(in, i); !ok {
			return nil, false
		}
	}
	return wire, i == len(in)
}

// record finds the end of a record.
func record(in []byte, i int) (int, bool) {
	for {
		if i >= len(in) {
			return 0, false
		}
		l := int(in[i])
		if i++; l == 0 {
			break
		}
		if l >= 0xc0 {
			i++
			break
		}
		if i += l; l > 63 {
			return 0, false
		}
	}
	if i+10 > len(in) {
		return 0, false
	}
	i += 10 + int(binary.BigEndian.Uint16(in[i+8:]))
	return i, i <= len(in)
}

// lower is a copy in lower case. The length of a label is no letter.
func lower(wire []byte) []byte {
	out := bytes.Clone(wire)
	for i, c := range out {
		if c-'A' < 26 {
			out[i] = c | 0x20
		}
	}
	return out
}

// optOf finds the OPT record of a question. There is at most one, and nothing
// else.
func optOf(q *dns.Msg) (opt *dns.OPT, ok bool) {
	if len(q.Extra) == 0 {
		return nil, true
	}
	opt, ok = q.Extra[0].(*dns.OPT)
	return opt, ok && len(q.Extra) == 1 && opt.Hdr.Name == "."
}

// use has the name mean these addresses.
func (m *meaning) use(addrs []netip.Addr) {
	m.v4, m.v6 = nil, nil
	for _, a := range addrs {
		if a.Is4() {
			m.v4 = append(m.v4, a)
		} else {
			m.v6 = append(m.v6, a)
		}
	}
}

// reply fills in what the name means.
func (a *answerer) reply(ctx context.Context, wire []byte, m *dns.Msg) Result {
	e := a.entry(wire)
	if e == nil {
		m.Rcode = dns.RcodeServerFailure
		explain(m, dns.ExtendedErrorCodeNotReady, "there is no policy yet")
		return Failed
	}
	if e.result == Dropped {
		return Dropped
	}
	a.met = e
	what, ttl := *e.meaning, uint32(virtualTTL)
	if t := m.Question[0].Qtype; e.real && (t == dns.TypeA || t == dns.TypeAAAA) {
		addrs, keep, err := a.names.cfg.Real(ctx, a.who, e.name)
		told := e
		if errors.Is(err, ErrBudget) {
			told = e.overBudget()
			what = *told.meaning
		}
		a.names.asked(a.who, told, a.from)
		virtual := errors.Is(err, errTaken) && len(e.v4) > 0
		switch {
		case virtual:
		case errors.Is(err, ErrAbsent):
			what.absent = true
		case errors.Is(err, ErrBudget):
		case err != nil:
			a.names.cfg.Log.Warn("a name was not looked up", "host", e.name, "err", err)
			m.Rcode = dns.RcodeServerFailure
			explain(m, dns.ExtendedErrorCodeNetworkError, "the gateway did not look it up")
			return Failed
		}
		if !virtual {
			what.use(addrs)
			ttl = uint32(min(max(keep, negativeTTL*time.Second), 300*time.Second) / time.Second)
		}
	} else {
		a.names.asked(a.who, e, a.from)
	}
	explain(m, what.code, what.text)
	if m.Answer = what.records(m.Question[0], ttl); len(m.Answer) == 0 {
		m.Ns = []dns.RR{soa(m.Question[0].Name, what.absent)}
	}
	if what.absent {
		m.Rcode = dns.RcodeNameError
	}
	return what.result
}

// records are those that answer a question.
func (w *meaning) records(q dns.Question, ttl uint32) (out []dns.RR) {
	if w.absent {
		return nil
	}
	head := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: ttl}
	switch q.Qtype {
	case dns.TypeA:
		for _, a := range w.v4 {
			out = append(out, &dns.A{Hdr: head, A: a.AsSlice()})
		}
	case dns.TypeAAAA:
		for _, a := range w.v6 {
			out = append(out, &dns.AAAA{Hdr: head, AAAA: a.AsSlice()})
		}
	case dns.TypePTR:
		if w.ptr != "" {
			out = []dns.RR{&dns.PTR{Hdr: head, Ptr: w.ptr}}
		}
	case dns.TypeSRV:
		if w.srv != 0 {
			target := strings.SplitN(strings.ToLower(q.Name), ".", 3)[2]
			out = []dns.RR{&dns.SRV{Hdr: head, Weight: 1, Port: w.srv, Target: target}}
		}
	case dns.TypeTXT:
		if w.txt != "" {
			head.Ttl = 0
			out = []dns.RR{&dns.TXT{Hdr: head, Txt: []string{w.txt}}}
		}
	case dns.TypeANY: // RFC 8482
		head.Rrtype = dns.TypeHINFO
		out = []dns.RR{&dns.HINFO{Hdr: head, Cpu: "RFC8482"}}
	}
	return out
}

func soa(name string, absent bool) *dns.SOA {
	if absent {
		name = "."
	}
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: negativeTTL},
		Ns:  "ns.sallyport.invalid.", Mbox: "hostmaster.sallyport.invalid.",
		Serial: soaTimes[0], Refresh: soaTimes[1], Retry: soaTimes[2], Expire: soaTimes[3], Minttl: soaTimes[4],
	}
}

// explain puts an extended error into an answer whose question knows EDNS.
func explain(m *dns.Msg, code uint16, text string) {
	if opt := m.IsEdns0(); opt != nil && code != 0 {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: code, ExtraText: clip(text)})
	}
}
