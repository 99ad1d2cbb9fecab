package nameserver

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/telemetry"
)

// maxEntries bounds the answers that are kept ready. Whoever asks for ever new
// names has those of all others made again, no more.
const maxEntries = 1 << 14

// An entry is a meaning with the answers to the common questions ready.
type entry struct {
	*meaning
	zone  *zone
	count *telemetry.Counter
	plain bool // the answers below are there
	// a, aaaa and other are what follows the question of that type.
	a, aaaa, other section
	// opt is the OPT record that follows, if the question had one.
	opt []byte

	// asked counts the questions that are not in a record yet.
	asked atomic.Uint64
	// beyond is what the name means once the budget of its destination is used up.
	beyond atomic.Pointer[entry]
}

// overBudget is e when there is no budget for it.
func (e *entry) overBudget() *entry {
	if o := e.beyond.Load(); o != nil {
		return o
	}
	o := &entry{zone: e.zone, meaning: &meaning{
		name: e.name, result: Invented, absent: true, rule: e.rule, reason: string(Invented),
		code: dns.ExtendedErrorCodeFiltered, text: "budget.names of the destination is used up",
	}}
	e.beyond.CompareAndSwap(nil, o)
	return e.beyond.Load()
}

// A section is the records after the question.
type section struct {
	records         []byte
	code            byte
	answers, stands byte // how many are answers, how many authority
}

// The flags of an answer: QR and AA; of the question RD and CD stay, RA is set.
const (
	flagsQRAA = 0x84
	flagRA    = 0x80
)

// doAt is where the bit DO is in an OPT record.
const doAt = 7

// An answerer answers the questions of one workload that come one after the
// other. It is not safe for concurrent use.
type answerer struct {
	names  *Names
	who    spiffeid.ID
	budget *budget
	most   int // entries
	q      question
	// from is who asks now, as far as it is known.
	from func() netip.AddrPort

	zone    *zone
	entries map[string]*entry
	met     *entry // of the last answer that was not ready, nil for what is no name
}

func (n *Names) answerer(who spiffeid.ID, most int) *answerer {
	return &answerer{names: n, who: who, budget: n.budgetOf(who), most: most, entries: map[string]*entry{}, from: nobody}
}

// nobody is who asks where that is not known.
func nobody() netip.AddrPort { return netip.AddrPort{} }

// may says whether the workload may ask one more question now.
func (a *answerer) may() bool { return a.names.may(a.who, a.budget) }

// at has what is asked next come from an address.
func (a *answerer) at(addr net.Addr) {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		a.from = tcp.AddrPort
	}
}

// quick answers the common question in place: b begins with a message of n
// bytes, and the answer has the size that is returned. 0 says that this takes
// more than a look.
func (a *answerer) quick(b []byte, n int) (size int, e *entry) {
	q := &a.q
	if !q.parse(b[:n]) {
		return 0, nil
	}
	e = a.entry(q.key())
	if e == nil || !e.plain {
		return 0, nil
	}
	s := &e.other
	switch q.typ {
	case typeA:
		s = &e.a
	case typeAAAA:
		s = &e.aaaa
	case typeOPT, dns.TypeANY, dns.TypeAXFR, dns.TypeIXFR, dns.TypeTKEY, dns.TypeTSIG:
		return 0, nil
	}
	size = q.end + len(s.records)
	if q.edns {
		size += len(e.opt)
	}
	if size > q.size || size > len(b) {
		return 0, nil
	}
	b[2] = flagsQRAA | b[2]&1
	b[3] = flagRA | b[3]&0x10 | s.code
	b[6], b[7], b[8], b[9], b[10], b[11] = 0, s.answers, 0, s.stands, 0, 0
	copy(b[q.end:], s.records)
	if q.edns {
		opt := b[q.end+len(s.records):]
		copy(opt, e.opt)
		b[11] = 1
		if q.do {
			opt[doAt] |= 0x80
		}
	}
	a.names.asked(a.who, e, a.from)
	return size, e
}

// entry finds what a name on the wire means to the workload, nil without a
// policy.
func (a *answerer) entry(wire []byte) *entry {
	z := a.names.zone.Load()
	if z != a.zone {
		a.zone = z
		clear(a.entries)
	}
	if e := a.entries[string(wire)]; e != nil {
		return e
	}
	if z == nil {
		return nil
	}
	if len(a.entries) >= a.most {
		clear(a.entries)
	}
	e := &entry{zone: z}
	if name, ok := host(wire); ok {
		e.meaning = a.names.meaning(z, a.who, name)
	} else {
		e.meaning = &meaning{name: "?", result: NoName, absent: true, reason: string(NoName), code: dns.ExtendedErrorCodeProhibited, text: "no host has such a name"}
	}
	e.count = a.names.counter(e.result)
	e.prepare()
	switch {
	case e.result == Invented, e.result == Full, e.result == Dropped, e.name == SelfTest: // not so for long
	default:
		a.entries[string(wire)] = e
	}
	return e
}

// prepare makes the answers to the common questions, unless they are long or
// must be looked up.
func (e *entry) prepare() {
	if e.result == Dropped || e.real || e.ptr != "" || e.srv != 0 || e.txt != "" || len(e.v4) > 1 || len(e.v6) > 1 {
		return
	}
	e.plain = true
	none := section{stands: 1, records: appendSOA(nil, e.absent)}
	if e.absent {
		none.code = dns.RcodeNameError
	}
	e.a, e.aaaa, e.other = none, none, none
	for _, addr := range e.v4 {
		e.a = section{answers: 1, records: appendAddress(nil, typeA, addr)}
	}
	for _, addr := range e.v6 {
		e.aaaa = section{answers: 1, records: appendAddress(nil, typeAAAA, addr)}
	}
	e.opt = appendOPT(nil, e.code, e.text)
}

// appendAddress writes a record about the name of the question.
func appendAddress(b []byte, typ uint16, a netip.Addr) []byte {
	b = append(b, 0xc0, headSize) // where the question has its name
	b = appendHead(b, typ, virtualTTL)
	raw := a.AsSlice()
	b = binary.BigEndian.AppendUint16(b, uint16(len(raw)))
	return append(b, raw...)
}

func appendHead(b []byte, typ uint16, ttl uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint16(b, classIN)
	return binary.BigEndian.AppendUint32(b, ttl)
}

// Who answers for a name, and who is responsible, by names that nobody asks for.
const (
	primary     = "\x02ns\x09sallyport\x07invalid\x00"
	responsible = "\x0ahostmaster\x09sallyport\x07invalid\x00"
)

// appendSOA writes the record by which resolvers remember that there is nothing
// (RFC 2308): of the name itself when it exists, of the root when it does not.
func appendSOA(b []byte, absent bool) []byte {
	if absent {
		b = append(b, 0)
	} else {
		b = append(b, 0xc0, headSize)
	}
	b = appendHead(b, dns.TypeSOA, negativeTTL)
	b = binary.BigEndian.AppendUint16(b, uint16(len(primary)+len(responsible)+20))
	b = append(append(b, primary...), responsible...)
	for _, v := range soaTimes {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

// soaTimes are serial, refresh, retry, expire and minimum.
var soaTimes = [5]uint32{1, 3600, 600, 86400, negativeTTL}

// appendOPT writes an OPT record, with an extended error when there is one.
func appendOPT(b []byte, code uint16, text string) []byte {
	b = append(b, 0)
	b = binary.BigEndian.AppendUint16(b, typeOPT)
	b = binary.BigEndian.AppendUint16(b, maxSize)
	b = append(b, 0, 0, 0, 0)
	if code == 0 {
		return append(b, 0, 0)
	}
	text = clip(text)
	b = binary.BigEndian.AppendUint16(b, uint16(6+len(text)))
	b = binary.BigEndian.AppendUint16(b, dns.EDNS0EDE)
	b = binary.BigEndian.AppendUint16(b, uint16(2+len(text)))
	b = binary.BigEndian.AppendUint16(b, code)
	return append(b, text...)
}

// clip keeps an explanation so short that an answer fits into what everybody
// takes.
func clip(text string) string { return text[:min(len(text), 96)] }
