package http2

import "slices"

// symbols are the bytes by the length of their codes (RFC 7541 appendix B). The
// codes of one length follow each other in the order of the bytes, and those of
// the next length follow them, so that this list is the whole code. What is left
// at the end of it, 30 ones, is EOS.
var symbols = [...]struct {
	bits  uint
	bytes string
}{
	{5, "012aceiost"},
	{6, " %-./3456789=A_bdfghlmnpru"},
	{7, ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"},
	{8, "&*,;XZ"},
	{10, "!\"()?"},
	{11, "'+|"},
	{12, "#>"},
	{13, "\x00$@[]~"},
	{14, "^}"},
	{15, "<`{"},
	{19, "\\\xc3\xd0"},
	{20, "\x80\x82\x83\xa2\xb8\xc2\xe0\xe2"},
	{21, "\x99\xa1\xa7\xac\xb0\xb1\xb3\xd1\xd8\xd9\xe3\xe5\xe6"},
	{22, "\x81\x84\x85\x86\x88\x92\x9a\x9c\xa0\xa3\xa4\xa9\xaa\xad\xb2\xb5\xb9\xba\xbb\xbd\xbe\xc4\xc6\xe4\xe8\xe9"},
	{23, "\x01\x87\x89\x8a\x8b\x8c\x8d\x8f\x93\x95\x96\x97\x98\x9b\x9d\x9e\xa5\xa6\xa8\xae\xaf\xb4\xb6\xb7\xbc\xbf\xc5\xe7\xef"},
	{24, "\x09\x8e\x90\x91\x94\x9f\xab\xce\xd7\xe1\xec\xed"},
	{25, "\xc7\xcf\xea\xeb"},
	{26, "\xc0\xc1\xc8\xc9\xca\xcd\xd2\xd5\xda\xdb\xee\xf0\xf2\xf3\xff"},
	{27, "\xcb\xcc\xd3\xd4\xd6\xdd\xde\xdf\xf1\xf4\xf5\xf6\xf7\xf8\xfa\xfb\xfc\xfd\xfe"},
	{28, "\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f\x10\x11\x12\x13\x14\x15\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f\xdc\xf9"},
	{30, "\x0a\x0d\x16"},
}

const (
	shortBits = 8  // codes up to here are found by one look
	longBits  = 30 // the longest
)

// shortCodes has, for the first bits of what is left, the byte that they begin
// with and the length of its code; 0 when that is longer.
var shortCodes = func() (out [1 << shortBits]struct{ symbol, bits uint8 }) {
	n := 0
	for _, s := range symbols {
		for _, c := range []byte(s.bytes) {
			for end := n + 1<<shortBits>>s.bits; n < end; n++ {
				out[n].symbol, out[n].bits = c, uint8(s.bits)
			}
		}
	}
	return out
}()

// longCodes has where the codes of each length begin and end, as the first of
// longBits.
var longCodes = func() (out [len(symbols)]struct{ from, to uint32 }) {
	at := uint32(0)
	for i, s := range symbols {
		out[i].from = at
		at += uint32(len(s.bytes)) << (longBits - s.bits)
		out[i].to = at
	}
	return out
}()

// appendHuffman appends what src encodes; false when that is EOS, or does not end
// in less than a byte of ones.
func appendHuffman(dst, src []byte) ([]byte, bool) {
	out := len(dst)
	dst = slices.Grow(dst, len(src)*8/5+1)
	dst = dst[:cap(dst)]
	have := uint64(0) // its last n bits are not decoded yet
	n := uint(0)
	for {
		for n <= 64-8 && len(src) > 0 {
			have = have<<8 | uint64(src[0])
			src, n = src[1:], n+8
		}
		for n >= shortBits {
			s := shortCodes[byte(have>>(n-shortBits))]
			if s.bits == 0 {
				break
			}
			dst[out] = s.symbol
			out++
			n -= uint(s.bits)
		}
		if len(src) == 0 && n < 8 && ^have&(1<<n-1) == 0 {
			return dst[:out], true
		}
		if n >= longBits || len(src) == 0 {
			c, bits := firstCode(have, n)
			if bits == 0 || bits > n {
				return nil, false
			}
			dst[out] = c
			out++
			n -= bits
		}
	}
}

// firstCode finds the code that the last n bits of have begin with, if they were
// followed by ones; bits is 0 for EOS.
func firstCode(have uint64, n uint) (c byte, bits uint) {
	var w uint32
	if n >= longBits {
		w = uint32(have>>(n-longBits)) & (1<<longBits - 1)
	} else {
		w = uint32(have<<(longBits-n)|(1<<(longBits-n)-1)) & (1<<longBits - 1)
	}
	for i, l := range longCodes {
		if w < l.to {
			bits = symbols[i].bits
			return symbols[i].bytes[(w-l.from)>>(longBits-bits)], bits
		}
	}
	return 0, 0
}
