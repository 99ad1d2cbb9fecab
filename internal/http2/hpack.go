package http2

// The encoder keeps no table, and says so once: what it makes of a head depends on that head
// alone, so lanes encode side by side, and the order in which their field
// sections are sent means nothing.

// noTable changes the size of our table to 0 (RFC 7541 sections 4.2 and 6.3). It
// stands in front of the first field section, and answers whatever size the peer
// allows from then on.
const noTable = 0x20

// indexOf has the names of the static table (RFC 7541 appendix A), each with the
// lowest index that it stands at.
var indexOf = map[string]uint8{
	":authority": 1, ":method": 2, ":path": 4, ":scheme": 6, ":status": 8,
	"accept-charset": 15, "accept-encoding": 16, "accept-language": 17, "accept-ranges": 18, "accept": 19,
	"access-control-allow-origin": 20, "age": 21, "allow": 22, "authorization": 23, "cache-control": 24,
	"content-disposition": 25, "content-encoding": 26, "content-language": 27, "content-length": 28,
	"content-location": 29, "content-range": 30, "content-type": 31, "cookie": 32, "date": 33, "etag": 34,
	"expect": 35, "expires": 36, "from": 37, "host": 38, "if-match": 39, "if-modified-since": 40,
	"if-none-match": 41, "if-range": 42, "if-unmodified-since": 43, "last-modified": 44, "link": 45,
	"location": 46, "max-forwards": 47, "proxy-authenticate": 48, "proxy-authorization": 49, "range": 50,
	"referer": 51, "refresh": 52, "retry-after": 53, "server": 54, "set-cookie": 55,
	"strict-transport-security": 56, "transfer-encoding": 57, "user-agent": 58, "vary": 59, "via": 60,
	"www-authenticate": 61,
}

// statusIndex is where a status stands in the static table, 0 for nowhere.
func statusIndex(status int) uint8 {
	switch status {
	case 200:
		return 8
	case 204:
		return 9
	case 206:
		return 10
	case 304:
		return 11
	case 400:
		return 12
	case 404:
		return 13
	case 500:
		return 14
	}
	return 0
}

// appendIndexed appends a field of the static table.
func appendIndexed(b []byte, index uint8) []byte { return append(b, 0x80|index) }

// appendStatus appends :status.
func appendStatus(b []byte, status int) []byte {
	if i := statusIndex(status); i > 0 {
		return appendIndexed(b, i)
	}
	return append(b, 8, 3, byte('0'+status/100%10), byte('0'+status/10%10), byte('0'+status%10))
}

// appendLine appends a field whose name has any case, as it stands, in lower
// case and without Huffman coding. A secret is marked as one that nobody may put
// in a table.
func appendLine(b, name, value []byte) []byte {
	var low [32]byte
	kind := byte(0)
	index := uint8(0)
	if len(name) <= len(low) {
		for i, c := range name {
			low[i] = lower(c)
		}
		index = indexOf[string(low[:len(name)])]
	}
	switch index {
	case 23, 32, 49, 55: // authorization, cookie, proxy-authorization, set-cookie
		kind = 0x10
	}
	b = appendInt(b, kind, 4, uint64(index))
	if index == 0 {
		b = appendInt(b, 0, 7, uint64(len(name)))
		for _, c := range name {
			b = append(b, lower(c))
		}
	}
	b = appendInt(b, 0, 7, uint64(len(value)))
	return append(b, value...)
}

// appendInt appends an integer behind the high bits of its first byte (RFC 7541
// section 5.1).
func appendInt(b []byte, high byte, bits uint, n uint64) []byte {
	most := uint64(1)<<bits - 1
	if n < most {
		return append(b, high|byte(n))
	}
	b = append(b, high|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}
