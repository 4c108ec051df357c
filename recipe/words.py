"""Word lists: English and French pairs, people's names, and made-up names that teach copying."""

import random

_PAIRS = """
house=maison cat=chat dog=chien bread=pain cheese=fromage milk=lait water=eau wine=vin apple=pomme pear=poire
cherry=cerise peach=pêche strawberry=fraise lemon=citron orange=orange grape=raisin egg=œuf butter=beurre sugar=sucre
salt=sel pepper=poivre honey=miel flour=farine oil=huile meat=viande fish=poisson chicken=poulet soup=soupe cake=gâteau
rice=riz potato=pomme_de_terre onion=oignon carrot=carotte garlic=ail bean=haricot mushroom=champignon coffee=café tea=thé
beer=bière tree=arbre flower=fleur grass=herbe leaf=feuille forest=forêt river=rivière lake=lac sea=mer mountain=montagne
island=île beach=plage sky=ciel sun=soleil moon=lune star=étoile rain=pluie snow=neige wind=vent fire=feu earth=terre
stone=pierre sand=sable horse=cheval cow=vache pig=cochon sheep=mouton goat=chèvre bird=oiseau duck=canard mouse=souris
bear=ours wolf=loup fox=renard lion=lion rabbit=lapin frog=grenouille snake=serpent bee=abeille butterfly=papillon
spider=araignée man=homme woman=femme boy=garçon girl=fille child=enfant friend=ami mother=mère father=père brother=frère
sister=sœur uncle=oncle aunt=tante king=roi queen=reine head=tête hand=main foot=pied eye=œil ear=oreille nose=nez
mouth=bouche heart=cœur arm=bras leg=jambe hair=cheveux tooth=dent door=porte window=fenêtre wall=mur roof=toit
kitchen=cuisine room=chambre garden=jardin table=table chair=chaise bed=lit lamp=lampe clock=horloge mirror=miroir key=clé
book=livre letter=lettre paper=papier pencil=crayon pen=stylo school=école church=église city=ville village=village
street=rue bridge=pont road=route car=voiture train=train boat=bateau plane=avion bicycle=vélo shop=magasin market=marché
money=argent hat=chapeau shoe=chaussure shirt=chemise dress=robe coat=manteau glove=gant sock=chaussette ring=bague
day=jour night=nuit morning=matin evening=soir week=semaine month=mois year=année hour=heure spring=printemps
summer=été autumn=automne winter=hiver red=rouge blue=bleu green=vert yellow=jaune black=noir white=blanc big=grand
small=petit new=nouveau old=vieux good=bon bad=mauvais hot=chaud cold=froid young=jeune beautiful=beau one=un two=deux
three=trois four=quatre five=cinq six=six seven=sept eight=huit nine=neuf ten=dix yes=oui no=non hello=bonjour
thanks=merci knife=couteau fork=fourchette spoon=cuillère plate=assiette glass=verre bottle=bouteille cup=tasse
"""
TRANSLATIONS: dict[str, str] = {
    english: french.replace("_", " ") for english, _, french in (pair.partition("=") for pair in _PAIRS.split())
}

_NAMES = """
John Mary Anna Peter Paul Lucy Emma Tom Ben Clara David Eva Frank Grace Henry Ida Jack Kate Leo Mia Nina Oscar Rosa Sam
Tina Victor Wendy Max Sophie Daniel Laura Simon Julia Martin Sarah James Alice George Helen Robert Jane William Ella
Thomas Nora Michael Ruth Charles Amy Edward Iris Philip Maria Carlos Lena Hans Greta Pierre Claire Louis Chloe Ahmed
Fatima Omar Layla Yuki Kenji Mei Chen Ravi Priya Anil Ivan Olga Boris Elena Marco Giulia Pablo Lucia Diego Ines Kofi Ama
"""
NAMES = _NAMES.split()

_SYLLABLES = (
    "Ba Be Bo Da De Do Fa Ga Jo Ka Ke La Le Li Lo Ma Me Mi Na Ne No Pa Ra Re Ro Sa Se Ta Te To Va Vi Wa Za El Al Ol",
    "ri li na va do mi ra la vi ne ta lo di ni re",
    "na ra n l s ia a o e la ne tta nd rt y ck",
)


def name(rng: random.Random) -> str:
    """A first name; one in three is made up, so that names are copied from the prompt rather than recalled."""
    if rng.random() < 0.67:
        return rng.choice(NAMES)
    start, middle, end = (rng.choice(syllables.split()) for syllables in _SYLLABLES)
    return start + (middle if rng.random() < 0.6 else "") + end


def pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (English, French) words."""
    return rng.sample(list(TRANSLATIONS.items()), count)
