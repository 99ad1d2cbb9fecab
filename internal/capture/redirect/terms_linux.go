package redirect

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A term is a part of a rule, as nft writes it and as the kernel reads it. Both
// are kept side by side, and a test has nft compare them.
type term struct {
	text  string
	exprs func(sets map[string]*nftables.Set) []expr.Any
}

func fixed(text string, es ...expr.Any) term {
	return term{text, func(map[string]*nftables.Set) []expr.Any { return es }}
}

func native32(v uint32) []byte  { return binary.NativeEndian.AppendUint32(nil, v) }
func native64(v uint64) []byte  { return binary.NativeEndian.AppendUint64(nil, v) }
func network16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func load(e expr.Any, want []byte) []expr.Any {
	return []expr.Any{e, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want}}
}

// loopbacks are the addresses that do not leave the machine by their meaning.
var loopbacks = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// The verdicts.
var (
	accept = fixed("accept", &expr.Verdict{Kind: expr.VerdictAccept})
	drop   = fixed("drop", &expr.Verdict{Kind: expr.VerdictDrop})
	// leave is for address translation: no rule of this chain changes it.
	leave      = fixed("return", &expr.Verdict{Kind: expr.VerdictReturn})
	reset      = fixed("reject with tcp reset", &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
	prohibited = fixed("reject with icmpx admin-prohibited", &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED})
)

// The labels of connections, high ones since others count from the lowest. A
// label is not a mark: no socket option sets it.
const (
	passed   = 127 // something that its sender may send was let through
	answered = 126 // whose port it is has answered from it
)

func labelBits(n int) []byte {
	words := [2]uint64{}
	words[n/64] = 1 << (n % 64)
	return append(native64(words[0]), native64(words[1])...)
}

// label puts a label on the connection of a packet.
func label(n int) term {
	return fixed(fmt.Sprintf("ct label set %d", n), &expr.Immediate{Register: 1, Data: labelBits(n)}, &expr.Ct{Key: expr.CtKeyLABELS, Register: 1, SourceRegister: true})
}

// labelled holds for the packets of a connection with a label.
func labelled(n int) term {
	return fixed(fmt.Sprintf("ct label %d", n), &expr.Ct{Key: expr.CtKeyLABELS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 16, Mask: labelBits(n), Xor: make([]byte, 16)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 16)})
}

func both(a, b term) term {
	return term{a.text + " " + b.text, func(sets map[string]*nftables.Set) []expr.Any { return slices.Concat(a.exprs(sets), b.exprs(sets)) }}
}

func goTo(chain string) term {
	return fixed("goto "+chain, &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain})
}

func redirectTo(port uint16) term {
	return fixed(fmt.Sprintf("redirect to :%d", port), &expr.Immediate{Register: 1, Data: network16(port)}, &expr.Redir{RegisterProtoMin: 1})
}

// redirectBy sends a connection to the port that the map has for its maker, and
// leaves alone what the map does not know.
func redirectBy(m portMap) term {
	key, text := expr.Any(&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}), "meta skuid"
	var level int
	if n, _ := fmt.Sscanf(m.name, "cgroups_%d", &level); n == 1 {
		key, text = &expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: 1}, fmt.Sprintf("socket cgroupv2 level %d", level)
	}
	return term{fmt.Sprintf("redirect to :%s map @%s", text, m.name), func(sets map[string]*nftables.Set) []expr.Any {
		s := sets[m.name]
		return []expr.Any{key, &expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}, &expr.Redir{RegisterProtoMin: 1}}
	}}
}

// What a packet is recognised by.

var protocols = map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_IGMP: "igmp", unix.IPPROTO_ICMPV6: "ipv6-icmp"}

func l4proto(p byte) term {
	return fixed("meta l4proto "+protocols[p], load(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, []byte{p})...)
}

func dport(proto string, p uint16) term {
	return fixed(fmt.Sprintf("%s dport %d", proto, p), load(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, network16(p))...)
}

func sport(p uint16) term {
	return fixed(fmt.Sprintf("tcp sport %d", p), load(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2}, network16(p))...)
}

func udpSport(p uint16) term {
	return fixed(fmt.Sprintf("udp sport %d", p), load(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2}, network16(p))...)
}

// daddr matches the destination by whole bytes first and by a mask where the
// prefix ends within one.
func daddr(p netip.Prefix) term {
	family, word, offset := byte(unix.NFPROTO_IPV4), "ip", uint32(16)
	if p.Addr().Is6() {
		family, word, offset = unix.NFPROTO_IPV6, "ip6", 24
	}
	want := p.Masked().Addr().AsSlice()
	mask := make([]byte, len(want))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	text := fmt.Sprintf("%s daddr %s", word, p)
	if p.IsSingleIP() {
		text = fmt.Sprintf("%s daddr %s", word, p.Addr())
	}
	n := uint32(len(want))
	es := load(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, []byte{family})
	es = append(es, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n})
	if !p.IsSingleIP() {
		es = append(es, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)})
	}
	return fixed(text, append(es, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want})...)
}

// leaving matches the destination of a frame with a packet of IP.
func leaving(p netip.Prefix) term {
	proto, word := uint16(unix.ETH_P_IP), "ip"
	if p.Addr().Is6() {
		proto, word = unix.ETH_P_IPV6, "ip6"
	}
	d := daddr(p)
	return term{fmt.Sprintf("meta protocol %s %s", word, d.text), func(sets map[string]*nftables.Set) []expr.Any {
		// In place of the family, which a frame has not.
		return append(load(&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1}, network16(proto)), d.exprs(sets)[2:]...)
	}}
}

func skuid(uid uint32) term {
	return fixed(fmt.Sprintf("meta skuid %d", uid), load(&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, native32(uid))...)
}

func inCgroup(g cgroup) term {
	text := fmt.Sprintf("socket cgroupv2 level %d %q", g.level, g.path[min(1, len(g.path)):])
	return fixed(text, load(&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(g.level), Register: 1}, native64(g.id))...)
}

// neighbours are the messages without which IPv6 finds nobody: neighbour
// discovery and multicast listeners.
var neighbours = []byte{130, 131, 132, 133, 135, 136, 143}

func icmp6(typ byte) term {
	return fixed(fmt.Sprintf("icmpv6 type %d", typ), load(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, []byte{typ})...)
}

var (
	// anyOwner holds for what a process sends by an open socket: only of such
	// a packet the kernel knows a user.
	anyOwner = known32("meta skuid >= 0", expr.MetaKeySKUID)
	// routed holds for what the stack has found a route for: only that has a
	// class of routes, be it none.
	routed    = known32("meta rtclassid >= 0", expr.MetaKeyRTCLASSID)
	answering = fixed("ct direction reply", load(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, []byte{1})...)
	asking    = fixed("ct direction original", load(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, []byte{0})...)
	// known holds for what belongs to a connection that there is, related for
	// what the kernel says of one: an error or a reset.
	known   = state("established,related", expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
	related = state("related", expr.CtStateBitRELATED)
	resets  = flags("rst", 0x04)
	// synAck is the answer to who opens a connection. It has no owner only when
	// the kernel keeps no socket for it: a SYN cookie.
	synAck = flags("(syn | ack)", 0x12)
	// opening is the first packet of who opens a connection.
	opening = flagged("syn / syn,ack", 0x12, 0x02)
	// stamp writes the ports of the first packet, as its sender knows them, where
	// that has no meaning: it acknowledges nothing. Nobody without rights over the
	// network has a packet begin with anything but zero there. A checksum over it is
	// made where it arrives, or changed along.
	stamp = fixed("tcp ackseq set @th,0,32", &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 4},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 8, Len: 4, CsumType: expr.CsumTypeInet, CsumOffset: 16})
	// free holds for the ports that every user may listen on.
	free = fixed("tcp sport >= 1024", &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: network16(1024)})
	localDst   = fixed("fib daddr type local", load(&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true}, native32(unix.RTN_LOCAL))...)
	toLoopback = fixed(`oif "lo"`, load(&expr.Meta{Key: expr.MetaKeyOIF, Register: 1}, native32(1))...)
	// fromLoopback needs no name of the interface: it is the first.
	fromLoopback = fixed(`iif "lo"`, load(&expr.Meta{Key: expr.MetaKeyIIF, Register: 1}, native32(1))...)
)

// known32 holds where the kernel has a number at all.
func known32(text string, key expr.MetaKey) term {
	return fixed(text, &expr.Meta{Key: key, Register: 1},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: make([]byte, 4)})
}

func state(names string, bits uint32) term {
	return fixed("ct state "+names, &expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native32(bits), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(0)})
}

func flags(names string, bits byte) term {
	return flagged(fmt.Sprintf("& %s == %s", names, names), bits, bits)
}

func flagged(text string, of, set byte) term {
	return fixed("tcp flags "+text, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{of}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{set}})
}
