package test

import (
	"slices"
	"strconv"
	"strings"
)

// strictGet and its like are messages that are right but for what is added.
func strictGet(fields string) []string {
	return []string{"GET " + strictPath + " HTTP/1.1\r\n" + strictHost + fields + "\r\n"}
}

func strictPost(fields, body string) []string {
	return []string{"POST " + strictPath + " HTTP/1.1\r\n" + strictHost + fields + "\r\n" + body}
}

func strictTarget(target string) []string {
	return []string{"GET " + target + " HTTP/1.1\r\n" + strictHost + "\r\n"}
}

// refuse is a case that must be refused, the connection closed.
func refuse(name string, status int, say ...string) strictCase {
	return strictCase{name: name, say: say, status: status}
}

// pass is a case that must arrive and be answered, the connection kept.
func pass(name string, say []string, sees ...string) strictCase {
	return strictCase{name: name, say: say, status: 200, keep: true, reach: whole, sees: sees}
}

const chunkedField = "Transfer-Encoding: chunked\r\n"

// behind is a body that ends at once where chunked is believed, and a request
// behind it.
var behind = "0\r\n\r\n" + smuggled

func strictClasses() []strictClass {
	all := append(bodyClasses(), lineClasses()...)
	all = append(all, fieldClasses()...)
	all = append(all, targetClasses()...)
	all = append(all, answerClasses()...)
	slices.SortStableFunc(all, func(a, b strictClass) int { return a.row - b.row })
	return all
}

// bodyClasses: where does the message end?
func bodyClasses() []strictClass {
	coding := func(name, value string, status int) strictCase {
		return refuse(name, status, strictPost("Transfer-Encoding:"+value+"\r\n", behind)...)
	}
	length := func(name, value string) strictCase {
		return refuse(name, 400, strictPost("Content-Length:"+value+"\r\n", "ab")...)
	}
	chunk := func(name, body string) strictCase {
		return refuse(name, 400, strictPost(chunkedField, body)...)
	}
	late := func(name, head, body string) strictCase {
		return strictCase{name: name + ", late", say: []string{strictPost(chunkedField, head)[0], body}, status: 400, reach: cutOff, doors: atIn}
	}
	return []strictClass{
		{1, "length and coding", []strictCase{
			refuse("length first", 400, strictPost("Content-Length: 5\r\n"+chunkedField, behind)...),
			refuse("coding first", 400, strictPost(chunkedField+"Content-Length: 5\r\n", behind)...),
			refuse("length zero", 400, strictPost(chunkedField+"Content-Length: 0\r\n", behind)...),
			refuse("length that fits", 400, strictPost("Content-Length: 5\r\n"+chunkedField, "0\r\n\r\n")...),
			refuse("coding on GET", 400, strictGet("Content-Length: 5\r\n"+chunkedField)...),
			refuse("length that Connection would remove", 400, strictPost("Connection: content-length\r\nContent-Length: 5\r\n"+chunkedField, behind)...),
		}},
		{2, "obscured coding", []strictCase{
			coding("prefix", " xchunked", 501), coding("suffix", " chunkedx", 501), coding("identity", " identity", 501),
			coding("identity last", " chunked, identity", 501), coding("identity first", " identity, chunked", 501),
			coding("gzip", " gzip", 501), coding("gzip first", " gzip, chunked", 501), coding("gzip last", " chunked, gzip", 501),
			coding("twice in a line", " chunked, chunked", 501), coding("empty", "", 501), coding("comma", " chunked,", 501),
			coding("comma first", " ,chunked", 501), coding("quoted", ` "chunked"`, 501), coding("parameter", " chunked;q=1", 501),
			coding("vertical tab", " \x0bchunked", 400), coding("form feed", " chunked\x0c", 400), coding("no-break space", " \xa0chunked", 501),
			coding("NUL", " chunked\x00", 400), coding("bare CR", " chunked\r", 400),
			refuse("twice", 400, strictPost(chunkedField+chunkedField, behind)...),
			refuse("twice, differing", 400, strictPost(chunkedField+"Transfer-Encoding: identity\r\n", behind)...),
			refuse("space before the colon", 400, strictPost("Transfer-Encoding : chunked\r\n", behind)...),
			refuse("tab before the colon", 400, strictPost("Transfer-Encoding\t: chunked\r\n", behind)...),
			refuse("space before the name", 400, strictPost(" Transfer-Encoding: chunked\r\n", behind)...),
			refuse("on a folded line", 501, strictPost("Transfer-Encoding:\r\n chunked\r\n", behind)...),
			refuse("in HTTP/1.0", 400, "POST "+strictPath+" HTTP/1.0\r\n"+strictHost+chunkedField+"\r\n"+behind),
			pass("any case is the same word", strictPost("transfer-ENCODING:\tCHUNKED \r\n", "2\r\nab\r\n0\r\n\r\n"), "Transfer-Encoding: chunked\r\n"),
			pass("another name is no coding", strictPost("X-Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", "ab"), "Content-Length: 2\r\n"),
		}},
		{4, "lengths", []strictCase{
			refuse("equal", 400, strictPost("Content-Length: 2\r\nContent-Length: 2\r\n", "ab")...),
			refuse("differing", 400, strictPost("Content-Length: 2\r\nContent-Length: 50\r\n", "ab"+smuggled)...),
			refuse("equal in other case", 400, strictPost("Content-Length: 2\r\ncontent-length: 2\r\n", "ab")...),
			length("list", " 2, 2"), length("plus", " +2"), length("minus", " -2"), length("huge", " 18446744073709551618"),
			length("empty", ""), length("hexadecimal", " 0x2"), length("leading zero", " 02"), length("fraction", " 2.0"),
			length("exponent", " 2e0"), length("inner space", " 1 2"), length("other digits", " \xd9\xa2"), length("quoted", ` "2"`),
			length("underscore", " 1_0"), length("list with nothing", " 2,"),
			pass("blanks around", strictPost("Content-Length: \t 2 \t\r\n", "ab"), "Content-Length: 2\r\n"),
			pass("zero", strictPost("Content-Length: 0\r\n", ""), "Content-Length: 0\r\n"),
		}},
		{5, "bodies where none is expected", []strictCase{
			{name: "GET with a request for a body", say: strictBody("GET", smuggled), status: 200, keep: true, reach: whole, fresh: true, sees: []string{"Connection: close\r\n"}},
			{name: "HEAD", say: strictBody("HEAD", smuggled), status: 200, keep: true, reach: whole, fresh: true, sees: []string{"Connection: close\r\n"}},
			{name: "OPTIONS", say: strictBody("OPTIONS", smuggled), status: 200, keep: true, reach: whole, fresh: true},
			{name: "DELETE", say: strictBody("DELETE", smuggled), status: 200, keep: true, reach: whole, fresh: true},
			{name: "GET, chunked", say: []string{"GET " + strictPath + " HTTP/1.1\r\n" + strictHost + chunkedField + "\r\n2\r\nab\r\n0\r\n\r\n"}, status: 200, keep: true, reach: whole, fresh: true},
			{name: "POST keeps its connection", say: strictPost("Content-Length: 2\r\n", "ab"), status: 200, keep: true, reach: whole, hides: []string{"Connection: close"}},
			{name: "an answer before the body", say: []string{strictPost("Content-Length: 100000\r\n", "a")[0], ""}, doors: atIn, status: 413, reach: cutOff,
				answer: "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", early: true},
			refuse("TRACE", 405, "TRACE "+strictPath+" HTTP/1.1\r\n"+strictHost+"\r\n").kept(),
			refuse("TRACE with a body", 400, "TRACE "+strictPath+" HTTP/1.1\r\n"+strictHost+"Content-Length: 2\r\n\r\nab"),
		}},
		{9, "chunks", []strictCase{
			chunk("size with prefix", "0x2\r\nab\r\n0\r\n\r\n"), chunk("size too large", "ffffffffffffffff2\r\nab\r\n0\r\n\r\n"),
			chunk("size of a negative number", "-2\r\nab\r\n0\r\n\r\n"), chunk("size with plus", "+2\r\nab\r\n0\r\n\r\n"),
			chunk("no size", "\r\nab\r\n0\r\n\r\n"), chunk("size that is no number", "zz\r\nab\r\n0\r\n\r\n"),
			chunk("space behind the size", "2 \r\nab\r\n0\r\n\r\n"), chunk("space before the size", " 2\r\nab\r\n0\r\n\r\n"),
			chunk("bare LF behind the size", "2\nab\r\n0\r\n\r\n"), chunk("bare CR behind the size", "2\rab\r\n0\r\n\r\n"),
			chunk("bare LF in an extension", "2;a\nab\r\n0\r\n\r\n"), chunk("bare CR in an extension", "2;a\rb\r\nab\r\n0\r\n\r\n"),
			chunk("NUL in an extension", "2;a=\x00\r\nab\r\n0\r\n\r\n"),
			chunk("data longer than its size", "2\r\nabc0\r\n\r\n"), chunk("bare LF behind the data", "2\r\nab\n0\r\n\r\n"),
			chunk("data shorter than its size", "5\r\nab\r\n0\r\n\r\n\r\n"),
			chunk("flood of extensions", "1;"+strings.Repeat("a", 17<<10)+"\r\na\r\n0\r\n\r\n").part(),
			chunk("bare LF behind the last", "0\n\r\n"), chunk("bare LF at the end", "0\r\n\n"+smuggled),
			chunk("size too large by zeros", strings.Repeat("0", 400)+"2\r\nab\r\n0\r\n\r\n"),
			late("bare LF behind the size", "2\r\nab\r\n", "2\nab\r\n0\r\n\r\n"), late("data longer than its size", "2\r\nab\r\n", "2\r\nabc0\r\n\r\n"),
			late("size that is no number", "2\r\nab\r\n", "zz\r\n"), late("bad trailer", "2\r\nab\r\n", "0\r\nA : b\r\n\r\n"),
			{name: "extensions are dropped", say: strictPost(chunkedField, `2;a=b;c="d"`+"\r\nab\r\n0;e\r\n\r\n"), status: 200, keep: true, reach: whole, sees: []string{"2\r\nab\r\n0\r\n\r\n"}, hides: []string{"a=b"}},
		}},
	}
}

// strictBody has a body where the method gives none a meaning.
func strictBody(method, body string) []string {
	return []string{method + " " + strictPath + " HTTP/1.1\r\n" + strictHost + "Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body}
}

// kept is the case with the connection kept.
func (c strictCase) kept() strictCase {
	c.keep = true
	return c
}

// part is the case with its head seen by the application, perhaps.
func (c strictCase) part() strictCase {
	c.reach = partly
	return c
}

// at is the case at these doors only.
func (c strictCase) at(d doors) strictCase {
	c.doors = d
	return c
}

// lineClasses: where does a line end, and what may stand in it?
func lineClasses() []strictClass {
	field := func(name, line string) strictCase { return refuse(name, 400, strictGet(line+"\r\n")...) }
	line := func(name string, status int, first string) strictCase {
		return refuse(name, status, first+"\r\n"+strictHost+"\r\n")
	}
	return []strictClass{
		{6, "folded fields", []strictCase{
			field("space", "A: b\r\n c"), field("tab", "A: b\r\n\tc"), field("blank line that is none", "A: b\r\n \r\nC: d"),
			refuse("behind the request line", 400, "GET "+strictPath+" HTTP/1.1\r\n "+strictHost+"\r\n"),
			refuse("in Content-Length", 400, strictPost("Content-Length:\r\n 2\r\n", "ab")...),
		}},
		{7, "line ends", []strictCase{
			refuse("LF throughout", 400, "GET "+strictPath+" HTTP/1.1\nHost: billing.mesh.internal\n\n"),
			field("LF in a line", "A: b\nC: d"),
			refuse("LF behind the request line", 400, "GET "+strictPath+" HTTP/1.1\n"+strictHost+"\r\n"),
			refuse("LF for the blank line", 400, "GET "+strictPath+" HTTP/1.1\r\n"+strictHost+"\n"+smuggled),
			refuse("blank line first", 400, "\r\n"+strictGet("")[0]),
			refuse("LF first", 400, "\n"+strictGet("")[0]),
			refuse("CR CR LF", 400, strictGet("A: b\r\r\n")...),
		}},
		{8, "bytes that fields may not hold", []strictCase{
			field("CR in a value", "A: b\rC: d"), field("NUL in a value", "A: b\x00c"), field("NUL in a name", "A\x00: b"),
			field("DEL in a value", "A: \x7f"), field("escape in a value", "A: \x1b[1m"), field("no name", ": b"), field("only a space for a name", " : b"),
			field("no colon", "Abc"), field("space in a name", "A b: c"), field("space behind a name", "A : b"), field("parenthesis in a name", "A(: b"),
			field("quote in a name", "A\": b"), field("other letters in a name", "\xc3\xa4: b"), field("slash in a name", "A/b: c"),
			pass("other letters in a value", strictGet("A: \xc3\xa4\r\n"), "A: \xc3\xa4\r\n"),
			pass("every byte that a name may hold", strictGet("!#$%&'*+-.^`|~09az: x\r\n"), "!#$%&'*+-.^`|~09az: x\r\n"),
			pass("an empty value", strictGet("A:\r\n"), "A: \r\n"),
		}},
		{0, "request lines", []strictCase{
			line("lower-case method", 400, "get "+strictPath+" HTTP/1.1"), line("method with a NUL", 400, "GET\x00 "+strictPath+" HTTP/1.1"),
			line("no method", 400, " "+strictPath+" HTTP/1.1"), line("two spaces", 400, "GET  "+strictPath+" HTTP/1.1"),
			line("tabs", 400, "GET\t"+strictPath+"\tHTTP/1.1"), line("space at the end", 400, "GET "+strictPath+" HTTP/1.1 "),
			line("lower-case version", 400, "GET "+strictPath+" http/1.1"), line("version 1.10", 400, "GET "+strictPath+" HTTP/1.10"),
			line("version 1.2", 505, "GET "+strictPath+" HTTP/1.2"), line("version 2.0", 505, "GET "+strictPath+" HTTP/2.0"),
			line("version 0.9", 505, "GET "+strictPath+" HTTP/0.9"), line("another protocol", 400, "GET "+strictPath+" RTSP/1.0"),
			refuse("no version", 400, "GET "+strictPath+"\r\n\r\n"), line("a second version", 400, "GET "+strictPath+" HTTP/1.1 HTTP/1.1"),
			line("long method", 501, strings.Repeat("A", 40)+" "+strictPath+" HTTP/1.1"),
			{name: "an HTTP/2 preface where HTTP/1.1 was agreed on", say: []string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}, status: 505, doors: atIn},
			refuse("a TLS hello", 400, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
		}},
	}
}

// fieldClasses: what do fields ask for, and whose words are they?
func fieldClasses() []strictClass {
	connection := func(name, options, more string) strictCase {
		return refuse(name, 400, strictGet("Connection: "+options+"\r\n"+more)...)
	}
	forged := func(name string, lines ...string) strictCase {
		return strictCase{name: name, say: strictGet(strings.Join(lines, "\r\n") + "\r\n"), status: 200, keep: true, reach: whole, hides: []string{"forged"}}
	}
	upgrade := func(name, method, protocol, body string) strictCase {
		return strictCase{name: name, say: []string{method + " " + strictPath + " HTTP/1.1\r\n" + strictHost + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + "\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n" + body},
			status: 200, keep: true, reach: whole, hides: []string{"Upgrade", "Settings"}}
	}
	once := func(name, field, a, b string) strictCase {
		return refuse(name, 400, strictGet(field+": "+a+"\r\n"+strings.ToLower(field)+": "+b+"\r\n")...)
	}
	return []strictClass{
		{10, "connection options", []strictCase{
			connection("Authorization", "authorization", "Authorization: Bearer x\r\n"), connection("Cookie", "close, Cookie", "Cookie: a=b\r\n"),
			connection("Host in a second line", "close\r\nConnection: Host", ""), connection("X-Forwarded-For", "x-forwarded-for", ""),
			connection("the caller", "X-Forwarded-Client-Cert", ""), connection("ours", "Sallyport-Decision", ""), connection("ours with underscore", "Sallyport_Decision", ""),
			connection("Content-Length", "Content-Length", ""), connection("Transfer-Encoding", "transfer-encoding", ""), connection("Content-Type", "content-type", ""),
			connection("trace", "traceparent", ""), connection("request id", "x-request-id", ""), connection("not a name", "a b", ""),
			connection("too many", strings.Repeat("a,", 17), ""),
			{name: "a field of the hop", say: strictGet("Connection: X-Hop\r\nX-Hop: gone\r\nX-Kept: here\r\n"), status: 200, keep: true, reach: whole, sees: []string{"X-Kept: here\r\n"}, hides: []string{"gone", "X-Hop"}},
			{name: "a field of the hop in the second line", say: strictGet("Connection: keep-alive\r\nX-Hop: gone\r\nConnection: x-hop\r\n"), status: 200, keep: true, reach: whole, hides: []string{"gone"}},
			{name: "fields that are always of the hop", say: strictGet("Keep-Alive: gone\r\nProxy-Connection: gone\r\nProxy-Authorization: gone\r\nProxy-Authenticate: gone\r\nUpgrade: gone\r\n"), status: 200, keep: true, reach: whole, hides: []string{"gone"}},
			{name: "close", say: strictGet("Connection: close\r\n"), status: 200, reach: whole, tells: []string{"Connection: close"}, hides: nil},
			{name: "close among others", say: strictGet("Connection: keep-alive, CLOSE\r\n"), status: 200, reach: whole},
			{name: "HTTP/1.0 closes", say: []string{"GET " + strictPath + " HTTP/1.0\r\n" + strictHost + "Connection: keep-alive\r\n\r\n"}, status: 200, reach: whole},
		}},
		{11, "request trailers", []strictCase{
			{name: "names and values are dropped", say: strictPost(chunkedField+"Trailer: X-Forwarded-For, Authorization\r\n", "2\r\nab\r\n0\r\nX-Forwarded-For: gone\r\nAuthorization: gone\r\nA: gone\r\n\r\n"), status: 200, keep: true, reach: whole, sees: []string{"0\r\n\r\n"}, hides: []string{"gone", "Trailer"}},
			refuse("bad", 400, strictPost(chunkedField, "0\r\nA : b\r\n\r\n")...), refuse("folded", 400, strictPost(chunkedField, "0\r\nA: b\r\n c\r\n\r\n")...),
			refuse("bare LF", 400, strictPost(chunkedField, "0\r\nA: b\n\r\n")...), refuse("with a length and a coding", 400, strictPost(chunkedField, "0\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n")...),
			refuse("bad, of a request that policy refuses", 403, "POST /v1/secret HTTP/1.1\r\n"+strictHost+chunkedField+"\r\n0\r\nA : b\r\n\r\n").at(atIn),
			refuse("good, of a request that policy refuses", 403, "POST /v1/secret HTTP/1.1\r\n"+strictHost+chunkedField+"\r\n0\r\nA: b\r\n\r\n").at(atIn).kept(),
			refuse("too large", 431, strictPost(chunkedField, "0\r\nA: "+strings.Repeat("a", 9<<10)+"\r\n\r\n")...).part(),
		}},
		{12, "TE", []strictCase{
			{name: "trailers is kept, the rest is not", say: strictGet("TE: gzip, trailers, deflate;q=0.5\r\nConnection: TE\r\n"), status: 200, keep: true, reach: whole, sees: []string{"TE: trailers\r\n"}, hides: []string{"gzip", "deflate"}},
			{name: "nothing to keep", say: strictGet("TE: gzip\r\n"), status: 200, keep: true, reach: whole, hides: []string{"TE:", "gzip"}},
		}},
		{13, "expectations", []strictCase{
			refuse("another", 417, strictPost("Expect: 200-ok\r\nContent-Length: 2\r\n", "ab")...), refuse("two", 400, strictPost("Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 2\r\n", "ab")...),
			refuse("more than that", 417, strictPost("Expect: 100-continue, x\r\nContent-Length: 2\r\n", "ab")...),
			{name: "answered here and not passed on", say: strictPost("Expect: 100-Continue\r\nContent-Length: 2\r\n", "ab"), status: 200, keep: true, reach: whole, hides: []string{"Expect"}},
			{name: "without a body", say: strictGet("Expect: 100-continue\r\n"), status: 200, keep: true, reach: whole, hides: []string{"Expect"}},
		}},
		{14, "upgrades", []strictCase{
			upgrade("h2c", "GET", "h2c", "\r\n"), upgrade("h2c with a body", "POST", "h2c", "Content-Length: 2\r\n\r\nab"), upgrade("h2c beside websocket", "GET", "h2c, websocket", "\r\n"),
			upgrade("websocket and then h2c", "GET", "websocket\r\nUpgrade: h2c", "\r\n"), upgrade("websocket by POST", "POST", "websocket", "Content-Length: 0\r\n\r\n"), upgrade("TLS", "GET", "TLS/1.0", "\r\n"),
			{name: "websocket that Connection does not name", say: strictGet("Upgrade: websocket\r\n"), status: 200, keep: true, reach: whole, hides: []string{"websocket"}},
			{name: "websocket answered by 200", say: strictGet("Connection: Upgrade\r\nUpgrade: websocket\r\n"), status: 200, keep: true, reach: whole, sees: []string{"Connection: Upgrade\r\nUpgrade: websocket\r\n"}},
			{name: "websocket answered by 101", say: strictGet("Connection: Upgrade\r\nUpgrade: WebSocket\r\n"), status: 101, reach: whole, answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", hangUp: true},
			{name: "h2c answered by 101", say: strictGet("Connection: Upgrade\r\nUpgrade: h2c\r\n"), status: 502, keep: true, reach: whole, answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", fresh: true},
		}},
		{21, "fields that stand once", []strictCase{
			once("Authorization", "Authorization", "Bearer a", "Bearer b"), once("Host", "Host", "billing.mesh.internal", "billing.mesh.internal"),
			once("Content-Type", "Content-Type", "text/plain", "text/plain"), once("traceparent", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x"),
			refuse("no Host", 400, "GET "+strictPath+" HTTP/1.1\r\nA: b\r\n\r\n"), refuse("no Host in HTTP/1.0", 400, "GET "+strictPath+" HTTP/1.0\r\n\r\n"),
			refuse("empty Host", 400, "GET "+strictPath+" HTTP/1.1\r\nHost:\r\n\r\n"), refuse("list in Host", 400, "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.internal, b\r\n\r\n"),
			refuse("user in Host", 400, "GET "+strictPath+" HTTP/1.1\r\nHost: a@billing.mesh.internal\r\n\r\n"), refuse("path in Host", 400, "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.internal/x\r\n\r\n"),
			refuse("port in Host that is none", 400, "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.internal:65536\r\n\r\n"), refuse("space in Host", 400, "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.internal b\r\n\r\n"),
		}},
		{22, "underscores", []strictCase{
			forged("X_Forwarded_For", "X_Forwarded_For: forged"), forged("Content_Length", "Content_Length: 1 forged"), forged("Transfer_Encoding", "Transfer_Encoding: forged"),
			forged("mixed", "X-Forwarded_Client-Cert: forged", "x_forwarded-client_cert: forged"), forged("authorization spelled otherwise", "Proxy_Authorization: forged"),
			pass("a name of the application's own", strictGet("My_Field: x\r\n"), "My_Field: x\r\n"),
		}},
		{23, "through which addresses", []strictCase{
			forged("of whom is not trusted", "X-Forwarded-For: 9.9.9.9, forged", "x-forwarded-for: forged"), forged("Forwarded", "Forwarded: for=forged"),
			pass("the peer's own", strictGet("X-Forwarded-For: 203.0.113.5\r\n"), "X-Forwarded-For: 127.0.0.1\r\n", "Forwarded: for=127.0.0.1;"),
		}},
		{24, "who speaks", []strictCase{
			forged("the chain of proxies", "X-Forwarded-For: forged", "X-Forwarded-Proto: forged", "X-Forwarded-Host: forged", "Forwarded: for=forged", "X-Real-IP: forged"),
			forged("the caller", "X-Forwarded-Client-Cert: By=x;URI=forged", "x-forwarded-client-cert: forged"),
			forged("ours", "Sallyport-Caller: forged", "sallyport_caller: forged", "SALLYPORT-Decision: forged"), forged("Envoy's", "X-Envoy-Original-Path: forged", "x-envoy-internal: forged"),
			forged("a trace that is none", "Traceparent: forged", "Tracestate: forged=1"),
			pass("the caller is named", strictGet(""), "X-Forwarded-Client-Cert: By="+id("/ns/shop/sa/billing")+";URI="+id("/ns/shop/sa/payment")+"\r\n"),
		}},
	}
}
